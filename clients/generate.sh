#!/usr/bin/env bash
# Writes the committed code of the Go and TypeScript clients below DIR: clients/generate.sh DIR
# Needs buf, go and node; DIR is `clients` itself, or elsewhere to compare.
set -euo pipefail
clients=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
# npm ci leaves this file in node_modules.
lock=package-lock.json
if [ "$clients/typescript/$lock" -nt "$clients/typescript/node_modules/.$lock" ]; then
  npm ci --prefix "$clients/typescript" --no-audit --no-fund --loglevel=error
fi
cd "$clients/../protos"
# What a proto that is gone had left.
rm -rf "$out"/go/{common,inference} "$out/typescript/src/gen"
buf generate --clean=false --output "$out"
