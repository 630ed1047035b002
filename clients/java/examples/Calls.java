import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.RetryInfo;
import io.grpc.ChannelCredentials;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.util.Iterator;
import java.util.List;
import java.util.concurrent.TimeUnit;
import rhizome.common.v1.ChatMessage;
import rhizome.common.v1.SamplingParams;
import rhizome.inference.v1.ChatInput;
import rhizome.inference.v1.GenerateRequest;
import rhizome.inference.v1.GenerateResponse;
import rhizome.inference.v1.InferenceServiceGrpc;
import rhizome.inference.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;
import rhizome.inference.v1.ListModelsRequest;

/**
 * What a caller does besides streaming: cancel, set a deadline, read errors, use TLS and an API
 * key.
 *
 * <p>Calls --target host:port [--ca FILE] [--api-key KEY] chat|cancel|deadline|error
 */
public final class Calls {
  private static final Metadata.Key<String> AUTHORIZATION = key("authorization");
  private static final Metadata.Key<String> PARAM = key("rhizome-param");

  private static Metadata.Key<String> key(String name) {
    return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
  }

  /** A channel: with TLS if {@code ca} names the certificates to trust, else without. */
  private static ManagedChannel connect(String target, String ca) throws IOException {
    ChannelCredentials credentials =
        ca == null
            ? InsecureChannelCredentials.create()
            : TlsChannelCredentials.newBuilder().trustManager(new File(ca)).build();
    return Grpc.newChannelBuilder(target, credentials).build();
  }

  /** The stub, sending the API key with every call. */
  private static InferenceServiceBlockingStub withKey(
      InferenceServiceBlockingStub stub, String apiKey) {
    if (apiKey == null) {
      return stub;
    }
    Metadata metadata = new Metadata();
    metadata.put(AUTHORIZATION, "Bearer " + apiKey);
    return stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
  }

  private static GenerateRequest ask(String question, SamplingParams.Builder sampling) {
    return GenerateRequest.newBuilder()
        .setChat(
            ChatInput.newBuilder()
                .addMessages(ChatMessage.newBuilder().setRole("user").setContent(question)))
        .setSampling(sampling)
        .build();
  }

  /** A request whose answer takes a while. */
  private static GenerateRequest longRequest() {
    return ask(
        "Count from 1 to 100.",
        SamplingParams.newBuilder().setTemperature(0).setMaxNewTokens(3500).setIgnoreEos(true));
  }

  private static void print(GenerateResponse piece) {
    System.out.print(piece.getText());
    System.out.flush();
  }

  private static void chat(InferenceServiceBlockingStub stub) {
    stub.generate(
            ask(
                "What is the capital of France?",
                SamplingParams.newBuilder().setTemperature(0).setMaxNewTokens(32)))
        .forEachRemaining(Calls::print);
    System.out.println();
  }

  private static void cancel(InferenceServiceBlockingStub stub) {
    // Calls that are made within a context end with it.
    try (Context.CancellableContext abortable = Context.current().withCancellation()) {
      Iterator<GenerateResponse> pieces = abortable.call(() -> stub.generate(longRequest()));
      for (int number = 1; pieces.hasNext(); number++) {
        print(pieces.next());
        if (number == 5) {
          abortable.cancel(null);
        }
      }
      throw new IllegalStateException("the call was not cancelled");
    } catch (StatusRuntimeException error) {
      if (error.getStatus().getCode() != Status.Code.CANCELLED) {
        throw error;
      }
    } catch (RuntimeException error) {
      throw error;
    } catch (Exception error) {
      throw new IllegalStateException(error);
    }
    // The connection stays as it is, for this call and any other.
    String model = stub.listModels(ListModelsRequest.getDefaultInstance()).getModels(0).getName();
    System.out.printf("%ncancelled; %s goes on%n", model);
  }

  private static void deadline(InferenceServiceBlockingStub stub) {
    stub.withDeadlineAfter(1, TimeUnit.SECONDS)
        .generate(longRequest())
        .forEachRemaining(Calls::print);
  }

  private static void badParameter(InferenceServiceBlockingStub stub) {
    stub.generate(ask("Hello", SamplingParams.newBuilder().setTemperature(-1)))
        .forEachRemaining(Calls::print);
  }

  /** Says what a failed call's status, details and trailers tell. */
  private static void report(StatusRuntimeException error) {
    Status status = error.getStatus();
    System.err.printf("%n%s: %s%n", status.getCode(), status.getDescription());
    Metadata trailers = error.getTrailers();
    if (trailers != null && trailers.containsKey(PARAM)) {
      System.err.printf("param: %s%n", trailers.get(PARAM));
    }
    for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
      if (detail.is(RetryInfo.class)) {
        System.err.printf("retry after %d ms%n", retryMillis(detail));
      }
    }
  }

  private static long retryMillis(Any detail) {
    try {
      var delay = detail.unpack(RetryInfo.class).getRetryDelay();
      return delay.getSeconds() * 1000 + delay.getNanos() / 1_000_000;
    } catch (InvalidProtocolBufferException error) {
      throw new IllegalStateException(error);
    }
  }

  public static void main(String[] arguments) throws IOException {
    String target = "localhost:30001";
    String ca = null;
    String apiKey = null;
    String command = "";
    for (Iterator<String> given = List.of(arguments).iterator(); given.hasNext(); ) {
      String argument = given.next();
      switch (argument) {
        case "--target" -> target = given.next();
        case "--ca" -> ca = given.next();
        case "--api-key" -> apiKey = given.next();
        default -> command = argument;
      }
    }
    ManagedChannel channel = connect(target, ca);
    try {
      run(command, withKey(InferenceServiceGrpc.newBlockingStub(channel), apiKey));
    } catch (StatusRuntimeException error) {
      report(error);
      System.exit(1);
    } finally {
      channel.shutdownNow();
    }
  }

  private static void run(String command, InferenceServiceBlockingStub stub) {
    switch (command) {
      case "chat" -> chat(stub);
      case "cancel" -> cancel(stub);
      case "deadline" -> deadline(stub);
      case "error" -> badParameter(stub);
      default -> throw new IllegalArgumentException("give one of chat, cancel, deadline, error");
    }
  }
}
