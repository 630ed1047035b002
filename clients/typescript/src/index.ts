// The public API's messages and service, and the messages that these contain.
export * from "./gen/rhizome/common/v1/chat_message_pb.js";
export * from "./gen/rhizome/common/v1/finish_reason_pb.js";
export * from "./gen/rhizome/common/v1/logprobs_pb.js";
export * from "./gen/rhizome/common/v1/sampling_params_pb.js";
export * from "./gen/rhizome/common/v1/text_options_pb.js";
export * from "./gen/rhizome/common/v1/usage_pb.js";
export * from "./gen/rhizome/inference/v1/inference_service_pb.js";
