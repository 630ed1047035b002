// Streams one chat from the system on localhost:30001, or at the address given.
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { InferenceService } from "rhizome-client";

const target = process.argv[2] ?? "localhost:30001";
const client = createClient(
  InferenceService,
  createGrpcTransport({ baseUrl: `http://${target}` }),
);
const stream = client.generate({
  input: {
    case: "chat",
    value: { messages: [{ role: "user", content: "What is the capital of France?" }] },
  },
  sampling: { temperature: 0, maxNewTokens: 32 },
});
for await (const piece of stream) {
  process.stdout.write(piece.text);
}
process.stdout.write("\n");
