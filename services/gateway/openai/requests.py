"""The request bodies of the OpenAI-compatible API: every parameter that is honoured, no other.

Whatever is absent here is refused by name. Null means absent everywhere.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rhizome.common.v1.logprobs_pb2 import LogprobOptions
from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.common.v1.text_options_pb2 import TextOptions
from services.common.errors import InvalidRequestError
from services.gateway.sampling import (
    MAX_TOP_LOGPROBS,
    ParamNames,
    SamplingInput,
    check_range,
    sampling_params,
    text_options,
)

_MAX_METADATA = 16


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and text completions share, SGLang's and vLLM's extensions included."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    rid: str | None = None
    session_id: str | None = None

    def check_common(self) -> None:
        """Rules that need no model. Raises InvalidRequestError."""
        check_range("priority", self.priority, -(2**31), 2**31 - 1)
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequestError(
                    "stream_options is only allowed with stream=true", "stream_options"
                )
            if self.stream_options.include_obfuscation:
                raise InvalidRequestError(
                    "stream_options.include_obfuscation is not supported",
                    "stream_options.include_obfuscation",
                )
        if (
            self.no_stop_trim is not None
            and self.include_stop_str_in_output is not None
            and self.no_stop_trim != self.include_stop_str_in_output
        ):
            raise InvalidRequestError(
                "no_stop_trim and include_stop_str_in_output contradict each other",
                "no_stop_trim",
            )
        if self.metadata is not None and len(self.metadata) > _MAX_METADATA:
            raise InvalidRequestError(
                f"metadata has {len(self.metadata)} pairs; at most {_MAX_METADATA} are allowed",
                "metadata",
            )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int | None, max_name: str) -> SamplingParams:
        return sampling_params(
            SamplingInput(
                names=ParamNames(max_name, "min_tokens", "seed"),
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                max_new_tokens=max_new_tokens,
                min_new_tokens=self.min_tokens,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
                logit_bias=self.logit_bias,
                seed=self.seed,
            )
        )

    def text(self) -> TextOptions:
        keep = self.no_stop_trim if self.no_stop_trim is not None else None
        return text_options(
            self.stop,
            no_stop_trim=self.include_stop_str_in_output if keep is None else keep,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
        )


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`json_schema` is known so that the refusal says what is not supported."""

    type: str
    json_schema: Any = None


class ChatRequest(CommonRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None

    def check(self) -> None:
        """Everything but the messages. Raises InvalidRequestError naming the parameter."""
        self.check_common()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            if self.max_tokens != self.max_completion_tokens:
                raise InvalidRequestError(
                    "max_tokens and max_completion_tokens contradict each other; give one",
                    "max_tokens",
                )
        self._check_tools()
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequestError(
                f"response_format of type {self.response_format.type!r} is not supported; "
                'only {"type": "text"} is',
                "response_format",
            )
        if self.response_format is not None and self.response_format.json_schema is not None:
            raise InvalidRequestError(
                "response_format.json_schema is not supported", "response_format.json_schema"
            )
        if self.store:
            raise InvalidRequestError("store=true is not supported", "store")
        if self.service_tier not in (None, "auto", "default"):
            raise InvalidRequestError(
                f"service_tier {self.service_tier!r} is not offered", "service_tier"
            )
        if self.modalities not in (None, ["text"]):
            raise InvalidRequestError(
                'modalities other than ["text"] are not supported', "modalities"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
        check_range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)

    def logprob_options(self) -> LogprobOptions | None:
        if not self.logprobs:
            return None
        return LogprobOptions(output=True, num_top=self.top_logprobs or 0)

    @property
    def rendered_tools(self) -> list[dict[str, Any]]:
        """Tools that the template shows the model."""
        return [] if self.tool_choice == "none" else self.tools or []

    def _check_tools(self) -> None:
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                'tool_choice must be "none" or "auto"; forcing a call is not supported',
                "tool_choice",
            )
        if self.tool_choice == "auto" and not self.tools:
            raise InvalidRequestError('tool_choice "auto" needs tools', "tool_choice")
        if self.parallel_tool_calls is not None and not self.tools:
            raise InvalidRequestError(
                "parallel_tool_calls is only allowed with tools", "parallel_tool_calls"
            )
        if self.parallel_tool_calls is False:
            raise InvalidRequestError(
                "parallel_tool_calls=false is not supported", "parallel_tool_calls"
            )
        for index, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            if (
                tool.get("type") != "function"
                or not isinstance(function, dict)
                or not isinstance(function.get("name"), str)
            ):
                raise InvalidRequestError(
                    f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}',
                    f"tools[{index}]",
                )


class CompletionRequest(CommonRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check(self) -> None:
        """Everything but the prompt. Raises InvalidRequestError naming the parameter."""
        self.check_common()
        check_range("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.suffix:
            raise InvalidRequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError("best_of is only supported when it equals n", "best_of")

    def logprob_options(self) -> LogprobOptions | None:
        if self.logprobs is None:
            return None
        return LogprobOptions(
            output=True, num_top=self.logprobs, prompt_start=0 if self.echo else None
        )
