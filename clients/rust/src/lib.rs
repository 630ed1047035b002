//! Client of Rhizome's public gRPC API. The modules are named as the proto packages are.

/// Messages that the services share.
pub mod common {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("rhizome.common.v1");
    }
}

/// The public API.
pub mod inference {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("rhizome.inference.v1");
    }
}
