from services.gateway.silence import CHECK_INTERVAL_S, Silence


def test_silence_grows_with_each_check_until_the_peer_is_heard() -> None:
    silence = Silence()
    assert [silence.check() for _ in range(3)] == [n * CHECK_INTERVAL_S for n in (1, 2, 3)]
    silence.end()
    assert silence.check() == CHECK_INTERVAL_S
