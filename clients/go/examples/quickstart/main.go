// Quickstart streams one chat from the system on localhost:30001, or at the address given.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	commonv1 "rhizome.example/go/common/v1"
	inferencev1 "rhizome.example/go/inference/v1"
)

func main() {
	target := "localhost:30001"
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	client := inferencev1.NewInferenceServiceClient(conn)
	stream, err := client.Generate(context.Background(), &inferencev1.GenerateRequest{
		Input: &inferencev1.GenerateRequest_Chat{Chat: &inferencev1.ChatInput{
			Messages: []*commonv1.ChatMessage{{Role: "user", Content: "What is the capital of France?"}},
		}},
		Sampling: &commonv1.SamplingParams{
			Temperature:  proto.Float32(0),
			MaxNewTokens: proto.Uint32(32),
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for {
		piece, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(piece.GetText())
	}
	fmt.Println()
}
