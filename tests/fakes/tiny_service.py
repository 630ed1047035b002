"""A real process with a real health service, for tests of what starts and watches processes.

usage: tiny_service.py LISTEN MODE    MODE: serve | fail | permanent | refuse | deaf
"""

import asyncio
import signal
import sys

from services.common.process import die_with_parent, stop_event
from services.common.rpc import running_server


async def main(listen: str, mode: str) -> int:
    print(f"loading for {mode}", flush=True)
    if mode in ("fail", "permanent", "refuse"):
        print("cannot load: the disk is full", flush=True)
        return {"fail": 1, "refuse": 2, "permanent": 3}[mode]
    stop = stop_event()
    async with running_server(lambda _: None, [], listen, grace_s=0.1):
        await stop.wait()
        if mode == "deaf":
            await asyncio.sleep(60)
    return 0


if __name__ == "__main__":
    listen, mode, parent_pid = sys.argv[1:4]
    die_with_parent(int(parent_pid))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(asyncio.run(main(listen, mode)))
