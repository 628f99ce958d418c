"""The sharder's worker processes."""

import os
import signal
import threading

from ddae.sharding import workers


def test_a_worker_that_was_killed_with_the_lock_stops_no_later_run():
    assert list(workers.run(lambda: 1, [()], 1, total=1)) == [1]
    ready = workers._FORK.Event()

    def hold():
        workers._num_done.get_lock().acquire()
        ready.set()
        threading.Event().wait()

    holder = workers._FORK.Process(target=hold)
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    found: list[int] = []
    run = threading.Thread(target=lambda: found.extend(workers.run(lambda: 2, [()], 1, total=1)), daemon=True)
    run.start()
    run.join(60)
    assert found == [2]
