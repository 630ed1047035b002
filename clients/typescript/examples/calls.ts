// What a caller does besides streaming: cancel, set a deadline, read errors, use TLS and an API
// key.
//
//   calls --target host:port [--ca FILE] [--api-key KEY] chat|cancel|deadline|error
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  type CallOptions,
  type Client,
  Code,
  ConnectError,
  type Interceptor,
  createClient,
} from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { type GenerateRequestSchema, InferenceService, type SamplingParamsSchema } from "rhizome-client";

type Caller = Client<typeof InferenceService>;
type Request = MessageInitShape<typeof GenerateRequestSchema>;

// A client: with TLS if `ca` names the certificates to trust, else without.
function connect(target: string, ca?: string, apiKey?: string): Caller {
  const interceptors = apiKey === undefined ? [] : [withKey(apiKey)];
  const transport =
    ca === undefined
      ? createGrpcTransport({ baseUrl: `http://${target}`, interceptors })
      : createGrpcTransport({
          baseUrl: `https://${target}`,
          interceptors,
          nodeOptions: { ca: readFileSync(ca) },
        });
  return createClient(InferenceService, transport);
}

// Sends the API key with every call.
function withKey(apiKey: string): Interceptor {
  return (next) => (request) => {
    request.header.set("authorization", `Bearer ${apiKey}`);
    return next(request);
  };
}

function ask(content: string, sampling: MessageInitShape<typeof SamplingParamsSchema>): Request {
  return { input: { case: "chat", value: { messages: [{ role: "user", content }] } }, sampling };
}

// A request whose answer takes a while.
function long(): Request {
  return ask("Count from 1 to 100.", { temperature: 0, maxNewTokens: 3500, ignoreEos: true });
}

// Prints an answer's text as it comes and calls `each` with the number of pieces so far.
async function stream(
  client: Caller,
  request: Request,
  options: CallOptions = {},
  each: (pieces: number) => void = () => {},
): Promise<void> {
  let pieces = 0;
  for await (const piece of client.generate(request, options)) {
    process.stdout.write(piece.text);
    each(++pieces);
  }
  process.stdout.write("\n");
}

function chat(client: Caller): Promise<void> {
  const question = "What is the capital of France?";
  return stream(client, ask(question, { temperature: 0, maxNewTokens: 32 }));
}

async function cancel(client: Caller): Promise<void> {
  const abort = new AbortController();
  try {
    await stream(client, long(), { signal: abort.signal }, (pieces) => {
      if (pieces === 5) abort.abort();
    });
    throw new Error("the call was not cancelled");
  } catch (error) {
    if (ConnectError.from(error).code !== Code.Canceled) throw error;
  }
  // The connection stays as it is, for this call and any other.
  const { models } = await client.listModels({});
  process.stdout.write(`\ncancelled; ${models[0]?.name} goes on\n`);
}

function deadline(client: Caller): Promise<void> {
  return stream(client, long(), { timeoutMs: 1000 });
}

function badParameter(client: Caller): Promise<void> {
  return stream(client, ask("Hello", { temperature: -1 }));
}

// Says what a failed call's status and trailers tell.
function report(error: ConnectError): void {
  console.error(`\n${Code[error.code]}: ${error.rawMessage}`);
  const param = error.metadata.get("rhizome-param");
  if (param !== null) console.error(`param: ${param}`);
  const wait = error.metadata.get("rhizome-retry-after-ms");
  if (wait !== null) console.error(`retry after ${wait} ms`);
}

const { values, positionals } = parseArgs({
  options: {
    target: { type: "string", default: "localhost:30001" },
    ca: { type: "string" },
    "api-key": { type: "string" },
  },
  allowPositionals: true,
});
const calls = new Map(Object.entries({ chat, cancel, deadline, error: badParameter }));
const call = calls.get(positionals[0] ?? "");
if (call === undefined) throw new Error("give one of chat, cancel, deadline, error");
try {
  await call(connect(values.target, values.ca, values["api-key"]));
} catch (error) {
  report(ConnectError.from(error));
  process.exitCode = 1;
}
