"""The rules of StreamText: offsets, handles, ends, fragments, turns for the event loop."""

from __future__ import annotations

import pytest

from rhizome.tokenizer.v1 import tokenizer_service_pb2 as pb
from services.common.errors import InvalidRequestError, PreconditionError
from services.common.rpc import MAX_FRAME_BYTES
from services.tokenizer.pieces import build_piece_tables
from services.tokenizer.session import TextSession
from tests.unit.tokenizer import vocabularies

TOKENIZER = vocabularies.byte_level()
TABLES = build_piece_tables(TOKENIZER)


@pytest.fixture
def session() -> TextSession:
    return TextSession(TABLES)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def opens(handle: int, *stop: str, **fields: object) -> pb.OpenText:
    opening = pb.OpenText(handle=handle, **fields)  # type: ignore[arg-type]
    opening.options.stop.extend(stop)
    return opening


def columns(*entries: tuple[int, int, list[int]]) -> pb.StreamTextRequest:
    request = pb.StreamTextRequest()
    for handle, offset, token_ids in entries:
        request.handles.append(handle)
        request.id_offsets.append(offset)
        request.num_ids.append(len(token_ids))
        request.token_ids.extend(token_ids)
    return request


def answer(session: TextSession, request: pb.StreamTextRequest) -> pb.StreamTextResponse:
    """All responses to one request, merged."""
    merged = pb.StreamTextResponse()
    for response in session.answer(request):
        if response is not None:
            merged.MergeFrom(response)
    return merged


def texts(response: pb.StreamTextResponse) -> dict[int, str]:
    found: dict[int, str] = {}
    for handle, text in zip(response.handles, response.texts, strict=True):
        found[handle] = found.get(handle, "") + text
    return found


def test_one_response_covers_all_handles(session: TextSession) -> None:
    request = columns((1, 0, ids("one")), (2, 0, ids("two")), (3, 0, ids("日")[:1]))
    request.opens.extend([opens(1), opens(2), opens(3)])
    [response] = [reply for reply in session.answer(request) if reply is not None]
    assert texts(response) == {1: "one", 2: "two"}
    assert list(response.ids_consumed) == [len(ids("one")), len(ids("two"))]
    assert not response.ends


def test_ids_seen_before_are_dropped_and_new_ones_after_them_taken(session: TextSession) -> None:
    a, b, c, d = ids("qzxj")
    answer(session, pb.StreamTextRequest(opens=[opens(1)]))
    assert texts(answer(session, columns((1, 0, [a, b])))) == {1: "qz"}
    assert texts(answer(session, columns((1, 0, [a, b])))) == {}
    assert texts(answer(session, columns((1, 1, [b, c, d])))) == {1: "xj"}
    assert texts(answer(session, columns((1, 3, [d])))) == {}


def test_a_gap_fails_the_session(session: TextSession) -> None:
    answer(session, pb.StreamTextRequest(opens=[opens(1)]))
    with pytest.raises(PreconditionError, match="ids 0 to 1 are missing"):
        answer(session, columns((1, 2, ids("q"))))


def test_a_reused_or_smaller_handle_fails_the_session(session: TextSession) -> None:
    answer(session, pb.StreamTextRequest(opens=[opens(5)], closes=[5]))
    with pytest.raises(PreconditionError, match="reused"):
        answer(session, pb.StreamTextRequest(opens=[opens(5)]))
    with pytest.raises(PreconditionError, match="reused"):
        answer(session, pb.StreamTextRequest(opens=[opens(4)]))


def test_a_handle_that_was_never_opened_is_an_error_of_that_handle(session: TextSession) -> None:
    request = columns((1, 0, ids("q")), (9, 4, ids("q")))
    request.opens.append(opens(1))
    request.finishes.append(8)
    response = answer(session, request)
    assert texts(response) == {1: "q"}
    assert [(end.handle, end.error.code) for end in response.ends] == [(9, 9), (8, 9)]
    assert "never opened" in response.ends[0].error.message


def test_pain_27_s_many_handles_in_one_message_let_the_loop_work(session: TextSession) -> None:
    answer(session, pb.StreamTextRequest(opens=[opens(handle) for handle in range(3000)]))
    replies = list(session.answer(columns(*((handle, 0, ids("q")) for handle in range(3000)))))
    assert replies[:2] == [None, None]
    assert len(replies[-1].texts) == 3000


def test_columns_that_do_not_fit_together_are_refused(session: TextSession) -> None:
    request = columns((1, 0, ids("q")))
    request.opens.append(opens(1))
    request.num_ids[0] = 5
    with pytest.raises(InvalidRequestError, match="add up"):
        answer(session, request)
    request.num_ids.append(1)
    with pytest.raises(InvalidRequestError, match="differ in length"):
        answer(TextSession(TABLES), request)


def test_finishing_flushes_and_ends_once(session: TextSession) -> None:
    request = columns((1, 0, [*ids("x"), ids("日")[0]]))
    request.opens.append(opens(1))
    request.finishes.append(1)
    response = answer(session, request)
    assert texts(response) == {1: "x\N{REPLACEMENT CHARACTER}"}
    [end] = response.ends
    assert (end.handle, end.WhichOneof("end")) == (1, "finished")
    again = answer(session, pb.StreamTextRequest(finishes=[1], closes=[1]))
    assert not again.ends
    assert session.num_open == 0


def test_closing_is_silent_and_late_ids_are_ignored(session: TextSession) -> None:
    answer(session, pb.StreamTextRequest(opens=[opens(1)]))
    response = answer(session, pb.StreamTextRequest(closes=[1, 1, 9]))
    assert not response.ends
    late = answer(session, columns((1, 7, ids("late"))))
    assert late == pb.StreamTextResponse()


def test_a_stop_string_names_the_id_and_ends_the_handle(session: TextSession) -> None:
    token_ids = ids("q") + ids("S") + ids("T") + ids("late")
    request = columns((1, 0, token_ids))
    request.opens.append(opens(1, "ST"))
    response = answer(session, request)
    assert texts(response) == {1: "q"}
    [end] = response.ends
    assert end.stop == pb.StopMatch(id_index=2, stop="ST")
    assert not answer(session, pb.StreamTextRequest(finishes=[1])).ends
    assert texts(answer(session, columns((1, 3, ids("late"))))) == {}


def test_an_id_outside_the_vocabulary_ends_its_handle_only(session: TextSession) -> None:
    request = columns((1, 0, [*ids("ok"), 100_000]), (2, 0, [100_000]), (3, 0, ids("fine")))
    request.opens.extend([opens(1), opens(2), opens(3)])
    response = answer(session, request)
    assert texts(response) == {1: "ok", 3: "fine"}
    assert [end.handle for end in response.ends] == [1, 2]
    assert all("100000 is outside" in end.error.message for end in response.ends)
    assert response.ends[0].error.code == 3
    assert session.num_open == 1


def test_bad_options_are_an_error_of_the_handle(session: TextSession) -> None:
    request = pb.StreamTextRequest(opens=[opens(1, ""), opens(2, context_ids=[10**6]), opens(3)])
    response = answer(session, request)
    assert [(end.handle, end.error.code) for end in response.ends] == [(1, 3), (2, 3)]
    assert session.num_open == 1


def test_a_replay_emits_what_the_caller_lacks(session: TextSession) -> None:
    token_ids = ids("Grüße aus Köln, 今日は")
    text = "Grüße aus Köln, 今日は"
    for taken in range(len(token_ids) + 1):
        received = TOKENIZER.decode(token_ids[:taken]).rstrip("\N{REPLACEMENT CHARACTER}")
        request = columns((taken, taken, token_ids[taken:]))
        request.opens.append(
            opens(taken, replay_ids=token_ids[:taken], emitted_bytes=len(received.encode()))
        )
        request.finishes.append(taken)
        assert received + texts(answer(session, request)).get(taken, "") == text


def test_a_long_replay_lets_the_loop_work_and_goes_out_in_fragments(session: TextSession) -> None:
    token_ids = ids("今日は良い天気ですね。") * 10_000
    replies = list(session.answer(pb.StreamTextRequest(opens=[opens(1, replay_ids=token_ids)])))
    assert len(replies) > len(token_ids) // 1024
    assert None in replies
    sent = [reply for reply in replies if reply is not None]
    assert max(reply.ByteSize() for reply in sent) < MAX_FRAME_BYTES
    assert "".join(text for reply in sent for text in reply.texts) == TOKENIZER.decode(token_ids)
    assert sent[-1].ids_consumed[-1] == len(token_ids)


def test_special_tokens_are_kept_on_request(session: TextSession) -> None:
    request = columns((1, 0, ids("a<｜end｜>")), (2, 0, ids("a<｜end｜>")))
    request.opens.extend([opens(1), opens(2)])
    request.opens[1].options.skip_special_tokens = False
    assert texts(answer(session, request)) == {1: "a", 2: "a<｜end｜>"}
