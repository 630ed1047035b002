import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import rhizome.common.v1.ChatMessage;
import rhizome.common.v1.SamplingParams;
import rhizome.inference.v1.ChatInput;
import rhizome.inference.v1.GenerateRequest;
import rhizome.inference.v1.InferenceServiceGrpc;

/** Streams one chat from the system on localhost:30001, or at the address given. */
public final class Quickstart {
  public static void main(String[] arguments) {
    String target = arguments.length > 0 ? arguments[0] : "localhost:30001";
    ManagedChannel channel =
        Grpc.newChannelBuilder(target, InsecureChannelCredentials.create()).build();
    try {
      GenerateRequest request =
          GenerateRequest.newBuilder()
              .setChat(
                  ChatInput.newBuilder()
                      .addMessages(
                          ChatMessage.newBuilder()
                              .setRole("user")
                              .setContent("What is the capital of France?")))
              .setSampling(SamplingParams.newBuilder().setTemperature(0).setMaxNewTokens(32))
              .build();
      InferenceServiceGrpc.newBlockingStub(channel)
          .generate(request)
          .forEachRemaining(piece -> System.out.print(piece.getText()));
      System.out.println();
    } finally {
      channel.shutdownNow();
    }
  }
}
