#!/usr/bin/env bash
# Writes the Python stubs of every .proto below this folder to DIR/<noun>/v1: protos/generate.sh DIR
# DIR's last part must be "rhizome", the name the stubs import each other by.
set -euo pipefail
protos=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1/.." && pwd)
cd "$protos"
messages=$(find rhizome -name '*.proto' | sort)
services=$(find rhizome -name '*_service.proto' | sort)
python -m grpc_tools.protoc -I . --python_out="$out" --mypy_out=quiet:"$out" $messages
python -m grpc_tools.protoc -I . --grpc_python_out="$out" --mypy_grpc_out=quiet:"$out" $services
for file in $messages; do
  touch "$out/$(dirname "$file")/__init__.py" "$out/$(dirname "$(dirname "$file")")/__init__.py"
done
