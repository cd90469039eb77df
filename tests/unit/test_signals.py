"""Signals of a scheduler that come before the first step."""

from __future__ import annotations

import os
import signal

import pytest

from automodel.train import signals


@pytest.fixture(autouse=True)
def own_handlers(monkeypatch):
    monkeypatch.setattr(signals, "_early", [])
    monkeypatch.setattr(signals, "_serves_one_run", False)
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_usr1_before_training_is_a_request_to_stop_and_kills_nothing():
    signals.serve_one_run()
    with signals.StopRequest() as stop:
        assert not stop.is_set
    os.kill(os.getpid(), signal.SIGUSR1)
    with signals.StopRequest() as stop:
        assert stop.signal_name == "SIGUSR1"


def test_term_does_not_kill_a_rank_whose_training_failed_before_it_has_said_why():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), signals.StopRequest():
        raise ValueError("in somebody else's program")
    assert signal.getsignal(signal.SIGTERM) is before
    signals.serve_one_run()
    with signals.StopRequest():
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ValueError), signals.StopRequest():
        raise ValueError("a peer has died")
    os.kill(os.getpid(), signal.SIGTERM)
