"""The life of a job's processes, from start to end.

Start. A launcher starts one process per rank and describes the job in environment variables (``automodel.environment``
reads and checks them). ``dist_info.initialize_distributed`` chooses the rank's device and backend (``backends``),
raises its limit of ``open_files``, brings the ranks together and makes torch's process group.

Rendezvous. Rank 0, or torchrun's agent, serves a TCPStore at MASTER_ADDR:MASTER_PORT. Every rank signs in there;
if some do not come in time, rank 0 announces which, and all ranks raise that. The store stays open for the whole run.
Everything that is not training itself goes through it: small requests that are polled (``awake.poll_for``), so no
thread is ever blocked in it.

Threads. Each rank of several has one ``watchdog`` thread, with its own connection to the store.

Phases. ``watchdog.set_phase`` notes what the rank does (loading, training step 7, saving); a slow phase has its own
time-out (``agreement.collective_timeout``). ``first_rank.FirstRankPerNode`` lets one rank of a node prepare what the
others read, over a ``side_group`` with a time-out of hours. ``agreement`` runs something on rank 0 or on all ranks and
reports an error to every rank, so none is left waiting in a collective.

A rank fails. It writes its error into the store; the first one written is the job's failure. A rank that dies without
a word is noticed by the watchdogs: within a second by those of its node, which see its process, else within 40 s by
the rank before it, which misses its heartbeat. Every watchdog sees the failure within a second, gives its main thread
4 s to end by itself, then ends the process with status 1. The launcher prints the first failing rank's report last.

A stall. The watchdog sees that the main thread's innermost frame is a wait and has not moved for nine tenths of the
collective time-out. The first to see it asks all ranks where they are (``stall_report``: phase, step, stack, and the
last collective from torch's ``flight_recorder``), reports which ranks did not arrive, and fails the job. Waits for
other ranks or the device therefore belong in this package (``waits``) or in torch.

A signal. ``train.signals`` turns TERM, INT and USR1 into a request to stop, which travels with the token counts of the
next step, so all ranks stop after the same step, save, and end with status 75. Long work outside of steps asks
``agreement.StopPoll``. A suspended job (SIGSTOP) is not stalled: ``awake.AwakeClock`` stands still while it is stopped.

The end. ``destroy_global_state`` destroys the group, and gives up after 20 s if a peer hangs. After a failure it is not
called, because a peer may be gone; ``launch.worker.exit_process`` then ends the process at once.
"""
