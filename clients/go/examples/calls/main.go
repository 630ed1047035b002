// Calls shows what a caller does besides streaming: cancel, set a deadline, read errors, use TLS
// and an API key.
//
//	calls --target host:port [--ca FILE] [--api-key KEY] chat|cancel|deadline|error
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	commonv1 "rhizome.example/go/common/v1"
	inferencev1 "rhizome.example/go/inference/v1"
)

// Type client is what the calls below share.
type client = inferencev1.InferenceServiceClient

// Connect opens a channel: with TLS if caFile names the certificates to trust, else without.
func connect(target, caFile string) (*grpc.ClientConn, error) {
	if caFile == "" {
		return grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	tls, err := credentials.NewClientTLSFromFile(caFile, "")
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(target, grpc.WithTransportCredentials(tls))
}

// WithKey sends the API key with every call made in the context it returns.
func withKey(ctx context.Context, key string) context.Context {
	if key == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
}

func ask(question string, sampling *commonv1.SamplingParams) *inferencev1.GenerateRequest {
	return &inferencev1.GenerateRequest{
		Input: &inferencev1.GenerateRequest_Chat{Chat: &inferencev1.ChatInput{
			Messages: []*commonv1.ChatMessage{{Role: "user", Content: question}},
		}},
		Sampling: sampling,
	}
}

// Long is a request whose answer takes a while.
func long() *inferencev1.GenerateRequest {
	return ask("Count from 1 to 100.", &commonv1.SamplingParams{
		Temperature:  proto.Float32(0),
		MaxNewTokens: proto.Uint32(3500),
		IgnoreEos:    proto.Bool(true),
	})
}

// Stream prints an answer's text as it comes and calls each with the number of pieces so far.
func stream(
	ctx context.Context, c client, request *inferencev1.GenerateRequest, each func(int),
) error {
	call, err := c.Generate(ctx, request)
	if err != nil {
		return err
	}
	for pieces := 1; ; pieces++ {
		piece, err := call.Recv()
		if errors.Is(err, io.EOF) {
			fmt.Println()
			return nil
		}
		if err != nil {
			return &callError{err, call.Trailer()}
		}
		fmt.Print(piece.GetText())
		each(pieces)
	}
}

func chat(ctx context.Context, c client) error {
	return stream(ctx, c, ask("What is the capital of France?", &commonv1.SamplingParams{
		Temperature:  proto.Float32(0),
		MaxNewTokens: proto.Uint32(32),
	}), func(int) {})
}

func cancel(ctx context.Context, c client) error {
	abort, stop := context.WithCancel(ctx)
	defer stop()
	err := stream(abort, c, long(), func(pieces int) {
		if pieces == 5 {
			stop()
		}
	})
	if status.Code(err) != codes.Canceled {
		return fmt.Errorf("the call was not cancelled: %w", err)
	}
	// The connection stays as it is, for this call and any other.
	models, err := c.ListModels(ctx, &inferencev1.ListModelsRequest{})
	if err != nil {
		return err
	}
	fmt.Printf("\ncancelled; %s goes on\n", models.GetModels()[0].GetName())
	return nil
}

func deadline(ctx context.Context, c client) error {
	ctx, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	return stream(ctx, c, long(), func(int) {})
}

func badParameter(ctx context.Context, c client) error {
	return stream(ctx, c, ask("Hello", &commonv1.SamplingParams{
		Temperature: proto.Float32(-1),
	}), func(int) {})
}

// CallError is a failed call with its trailers, which say more than its status.
type callError struct {
	error
	trailer metadata.MD
}

func (e *callError) Unwrap() error { return e.error }

// Report says what a failed call's status, details and trailers tell.
func report(err error) {
	var trailer metadata.MD
	var call *callError
	if errors.As(err, &call) {
		err, trailer = call.error, call.trailer
	}
	failed := status.Convert(err)
	fmt.Fprintf(os.Stderr, "\n%s: %s\n", failed.Code(), failed.Message())
	for _, param := range trailer.Get("rhizome-param") {
		fmt.Fprintf(os.Stderr, "param: %s\n", param)
	}
	for _, detail := range failed.Details() {
		if retry, ok := detail.(*errdetails.RetryInfo); ok {
			wait := retry.GetRetryDelay().AsDuration()
			fmt.Fprintf(os.Stderr, "retry after %d ms\n", wait.Milliseconds())
		}
	}
}

func main() {
	target := flag.String("target", "localhost:30001", "host:port of the gRPC API")
	ca := flag.String("ca", "", "PEM file of the certificates to trust; none: no TLS")
	key := flag.String("api-key", "", "API key")
	flag.Parse()
	call, known := map[string]func(context.Context, client) error{
		"chat": chat, "cancel": cancel, "deadline": deadline, "error": badParameter,
	}[flag.Arg(0)]
	if !known {
		log.Fatal("give one of chat, cancel, deadline, error")
	}
	conn, err := connect(*target, *ca)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	if err := call(withKey(context.Background(), *key), inferencev1.NewInferenceServiceClient(conn)); err != nil {
		report(err)
		os.Exit(1)
	}
}
