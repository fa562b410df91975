"""Our WebSocket client against Autobahn's fuzzing server: autobahn.py PORT INDEX, the path of the report."""
import collections
import json
import os
import platform
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

import easywechat  # noqa: E402

BASE, AGENT = 'ws://127.0.0.1:%s' % sys.argv[1], 'easywechat-' + platform.python_version()


class Client(easywechat._WebSocket):
    most = 32 << 20


def dial(path):
    for _ in range(100):        # the server is starting
        try:
            return Client(BASE + path)
        except ConnectionRefusedError:
            time.sleep(0.1)
    return Client(BASE + path)


def messages(path, echo=False):
    """What the server says, echoed, until it closes."""
    ws, heard = dial(path), []
    try:
        while True:
            heard.append(ws.receive(30))
            if heard[-1] is None:
                raise SystemExit('%s hangs' % path)
            if echo:
                ws.send(heard[-1])
    except OSError:
        return heard


def main():
    begin, count = time.monotonic(), int(messages('/getCaseCount')[0])
    for case in range(1, count + 1):
        messages('/runCase?case=%d&agent=%s' % (case, AGENT), echo=True)
    messages('/updateReports?agent=' + AGENT)
    with open(sys.argv[2]) as f:
        report = json.load(f)[AGENT]
    kinds = collections.Counter(case[key] for case in report.values() for key in ('behavior', 'behaviorClose'))
    failed = [name for name, case in report.items() for key in ('behavior', 'behaviorClose')
              if case[key] not in ('OK', 'NON-STRICT', 'INFORMATIONAL')]
    print('%s: %d cases in %.0f s, %s %s' % (AGENT, count, time.monotonic() - begin, dict(kinds), failed or ''))
    print('Autobahn: %d passed, %d failed' % (count - len(set(failed)), len(set(failed))))
    return bool(failed) or not count


if __name__ == '__main__':
    sys.exit(main())
