//! Streams one chat from the system on localhost:30001, or at the address given.

use std::io::Write;

use rhizome_client::common::v1::{ChatMessage, SamplingParams};
use rhizome_client::inference::v1::inference_service_client::InferenceServiceClient;
use rhizome_client::inference::v1::{ChatInput, GenerateRequest, generate_request::Input};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let target = std::env::args().nth(1).unwrap_or("localhost:30001".into());
    let mut client = InferenceServiceClient::connect(format!("http://{target}")).await?;
    let request = GenerateRequest {
        input: Some(Input::Chat(ChatInput {
            messages: vec![ChatMessage {
                role: "user".into(),
                content: "What is the capital of France?".into(),
                ..Default::default()
            }],
            ..Default::default()
        })),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_new_tokens: Some(32),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut stream = client.generate(request).await?.into_inner();
    while let Some(piece) = stream.message().await? {
        print!("{}", piece.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
