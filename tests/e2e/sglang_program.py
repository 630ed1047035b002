"""Programs in SGLang's own frontend language, run against URL; prints what they gave as JSON.

usage: sglang_program.py PACKAGES URL. PACKAGES holds the unmodified sglang package, whose
`__init__` imports its GPU runtime; only the frontend is wanted, so the package is entered below it.
"""

import json
import sys
import types
from pathlib import Path


def main(packages: str, url: str) -> None:
    sys.path.insert(0, packages)
    package = types.ModuleType("sglang")
    package.__path__ = [str(Path(packages) / "sglang")]
    sys.modules["sglang"] = package
    from sglang.lang.api import (
        assistant,
        function,
        gen,
        get_server_info,
        select,
        set_default_backend,
        user,
    )
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
    from sglang.lang.choices import (
        greedy_token_selection,
        token_length_normalized,
        unconditional_likelihood_normalized,
    )

    backend = RuntimeEndpoint(url, chat_template_name="chatml")
    set_default_backend(backend)

    @function
    def conversation(s, name):  # type: ignore[no-untyped-def]
        s += user(f"My name is {name}.")
        s += assistant(gen("greeting", max_tokens=32, temperature=0))
        s += user("What is my name?")
        s += assistant(gen("answer", max_tokens=32, temperature=0))

    @function
    def choose(s, method):  # type: ignore[no-untyped-def]
        s += user("What is the capital of France?")
        s += assistant(
            "The capital of France is"
            + select("city", choices=[" Oslo", " Paris", " Rome"], choices_method=method)
        )

    @function
    def branches(s):  # type: ignore[no-untyped-def]
        s += user("What is the capital of France?")
        forks = s.fork(2)
        for number, fork in enumerate(forks):
            fork += assistant(gen("reply", max_tokens=8 + 8 * number, temperature=0))
        forks.join()
        s["replies"] = [fork["reply"] for fork in forks]

    @function
    def stopped(s):  # type: ignore[no-untyped-def]
        s += user("What is the capital of France?")
        s += assistant(gen("reply", max_tokens=32, temperature=0, stop="Par"))

    backend.flush_cache()
    state = conversation.run(name="Emma")
    streamed = "".join(conversation.run(name="Emma", stream=True).text_iter())
    batch = conversation.run_batch([{"name": "Emma"}, {"name": "Emma"}], progress_bar=False)
    methods = (token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized)
    print(
        json.dumps(
            {
                "answer": state["answer"],
                "streamed": streamed,
                "batch": [one["answer"] for one in batch],
                "cities": [choose.run(method=method)["city"] for method in methods],
                "replies": branches.run()["replies"],
                "stopped": stopped.run()["reply"],
                "tokens": state.get_meta_info("answer")["completion_tokens"],
                "server_info": sorted(get_server_info())[:1],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
