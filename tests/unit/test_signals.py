"""Signals of a scheduler that come before the first step."""

from __future__ import annotations

import os
import signal

from automodel.train import signals


def test_usr1_before_training_is_a_request_to_stop_and_kills_nothing(monkeypatch):
    monkeypatch.setattr(signals, "_early", [])
    before = signal.getsignal(signal.SIGUSR1)
    try:
        signals.keep_early_usr1()
        with signals.StopRequest() as stop:
            assert not stop.is_set
        os.kill(os.getpid(), signal.SIGUSR1)
        with signals.StopRequest() as stop:
            assert stop.signal_name == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, before)
