//! Generates the client from the protos, with the protoc that comes as a crate.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = tonic_prost_build::Config::new();
    config.protoc_executable(protoc_bin_vendored::protoc_bin_path()?);
    tonic_prost_build::configure().build_server(false).compile_with_config(
        config,
        &["../../protos/rhizome/inference/v1/inference_service.proto"],
        &["../../protos"],
    )?;
    Ok(())
}
