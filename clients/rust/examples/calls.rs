//! What a caller does besides streaming: cancel, set a deadline, read errors, use TLS and an API
//! key.
//!
//!     calls --target host:port [--ca FILE] [--api-key KEY] chat|cancel|deadline|error

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use rhizome_client::common::v1::{ChatMessage, SamplingParams};
use rhizome_client::inference::v1::inference_service_client::InferenceServiceClient;
use rhizome_client::inference::v1::{
    ChatInput, GenerateRequest, ListModelsRequest, generate_request::Input,
};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::{Interceptor, interceptor::InterceptedService};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt;

type Client = InferenceServiceClient<InterceptedService<Channel, ApiKey>>;

/// Sends the API key with every call.
#[derive(Clone)]
struct ApiKey(Option<MetadataValue<Ascii>>);

impl Interceptor for ApiKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = &self.0 {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

/// A channel: with TLS if `ca` names the certificates to trust, else without.
fn connect(target: &str, ca: Option<&str>) -> Result<Channel, Box<dyn Error>> {
    let Some(file) = ca else {
        return Ok(Endpoint::from_shared(format!("http://{target}"))?.connect_lazy());
    };
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(file)?));
    Ok(Endpoint::from_shared(format!("https://{target}"))?.tls_config(tls)?.connect_lazy())
}

fn ask(question: &str, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::Chat(ChatInput {
            messages: vec![ChatMessage {
                role: "user".into(),
                content: question.into(),
                ..Default::default()
            }],
            ..Default::default()
        })),
        sampling: Some(sampling),
        ..Default::default()
    }
}

/// A request whose answer takes a while.
fn long() -> GenerateRequest {
    let sampling = SamplingParams {
        temperature: Some(0.0),
        max_new_tokens: Some(3500),
        ignore_eos: Some(true),
        ..Default::default()
    };
    ask("Count from 1 to 100.", sampling)
}

/// Prints an answer's text as it comes, of `most` pieces at most. Dropping the stream, as happens
/// when this returns, cancels the call.
async fn stream(
    client: &mut Client,
    request: impl tonic::IntoRequest<GenerateRequest>,
    most: usize,
) -> Result<(), Box<dyn Error>> {
    let mut stream = client.generate(request).await?.into_inner();
    for _ in 0..most {
        let Some(piece) = stream.message().await? else { break };
        print!("{}", piece.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}

async fn chat(client: &mut Client) -> Result<(), Box<dyn Error>> {
    let sampling =
        SamplingParams { temperature: Some(0.0), max_new_tokens: Some(32), ..Default::default() };
    stream(client, ask("What is the capital of France?", sampling), usize::MAX).await
}

async fn cancel(client: &mut Client) -> Result<(), Box<dyn Error>> {
    stream(client, long(), 5).await?;
    // The connection stays as it is, for this call and any other.
    let models = client.list_models(ListModelsRequest {}).await?.into_inner().models;
    println!("cancelled; {} goes on", models[0].name);
    Ok(())
}

async fn deadline(client: &mut Client) -> Result<(), Box<dyn Error>> {
    let limit = Duration::from_secs(1);
    let mut request = Request::new(long());
    // The server keeps this one, and frees what the call holds.
    request.set_timeout(limit);
    // Should the server be out of reach, so that its status does not come.
    tokio::time::timeout(2 * limit, stream(client, request, usize::MAX)).await?
}

async fn bad_parameter(client: &mut Client) -> Result<(), Box<dyn Error>> {
    let sampling = SamplingParams { temperature: Some(-1.0), ..Default::default() };
    stream(client, ask("Hello", sampling), usize::MAX).await
}

/// Says what a failed call's status, details and trailers tell.
fn report(error: &(dyn Error + 'static)) {
    let Some(status) = error.downcast_ref::<Status>() else {
        return eprintln!("{error}");
    };
    eprintln!("\n{:?}: {}", status.code(), status.message());
    if let Some(param) = status.metadata().get("rhizome-param") {
        eprintln!("param: {}", param.to_str().unwrap_or_default());
    }
    if let Some(wait) = status.get_details_retry_info().and_then(|retry| retry.retry_delay) {
        eprintln!("retry after {} ms", wait.as_millis());
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let (mut target, mut ca, mut key, mut command) = ("localhost:30001".into(), None, None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--target" => target = arguments.next().ok_or("--target host:port")?,
            "--ca" => ca = Some(arguments.next().ok_or("--ca FILE")?),
            "--api-key" => key = Some(arguments.next().ok_or("--api-key KEY")?),
            _ => command = Some(argument),
        }
    }
    let bearer = key.map(|key| format!("Bearer {key}").parse()).transpose()?;
    let channel = connect(&target, ca.as_deref())?;
    let mut client = InferenceServiceClient::with_interceptor(channel, ApiKey(bearer));
    match command.as_deref() {
        Some("chat") => chat(&mut client).await,
        Some("cancel") => cancel(&mut client).await,
        Some("deadline") => deadline(&mut client).await,
        Some("error") => bad_parameter(&mut client).await,
        _ => Err("give one of chat, cancel, deadline, error".into()),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(error.as_ref());
            ExitCode::FAILURE
        }
    }
}
