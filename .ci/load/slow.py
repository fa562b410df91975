"""Real messages while slow connections are held: slow.py [CONNECTIONS [SECONDS]], 1,000 and 60 by default.

The server is --echo in a process of its own with 1,024 descriptors. Kinds: silent, a header byte
every half second, a body byte every half second, one byte behind a complete request, a refused body of
which a byte comes every half second; whoever is closed connects again.
Printed: lost, p50, p99, slowest, RSS; at the end how long SIGTERM takes with the connections held.
"""
import os
import re
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path.insert(0, ROOT)

import easywechat  # noqa: E402

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
SECONDS = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
KINDS = {'silent': (b'', b''), 'header': (b'GET /weixin HTTP/1.1\r\nX: ', b'a'),
         'body': (b'POST /weixin HTTP/1.1\r\nContent-Length: 99999\r\n\r\n', b'a'),
         'behind': (b'GET /weixin HTTP/1.1\r\n\r\na', b'a'),
         'refused': (b'POST /weixin HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n', b'a')}


def hold(address, kind, stop):
    """COUNT slow connections from one selector loop, reconnecting what the server closes."""
    first, more = KINDS[kind]
    poll, socks = selectors.DefaultSelector(), set()
    tick = time.monotonic()
    while not stop.is_set():
        for _ in range(min(100, COUNT - len(socks))):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(address)
            socks.add(sock)
            poll.register(sock, selectors.EVENT_READ)
        for key, _ in poll.select(0.02):
            try:
                gone = not key.fileobj.recv(4096)
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                poll.unregister(key.fileobj)
                socks.discard(key.fileobj)
                hold.begun.discard(key.fileobj)
                key.fileobj.close()
        again = time.monotonic() - tick > 0.5
        for sock in list(socks if again else socks - hold.begun):
            try:
                sock.send(more if sock in hold.begun else first)
                hold.begun.add(sock)
            except OSError:
                pass
        if again:
            tick = time.monotonic()
    for sock in socks:
        sock.close()


hold.begun = set()


def measure(kind, port, pid):
    stop = threading.Event()
    holder = threading.Thread(target=hold, args=(('127.0.0.1', port), kind, stop))
    holder.start()
    time.sleep(1)
    times, lost, peak = [], 0, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        begin = time.monotonic()
        try:
            reply = easywechat._probe('http://127.0.0.1:%d/weixin' % port, easywechat._DEMO, '还在')[1]
            lost += reply.get('Content') != '还在'
        except easywechat._CommandError as e:
            lost += 1
            print(e)
        times.append((time.monotonic() - begin) / 2)        # a probe is two requests
        with open('/proc/%d/status' % pid) as f:
            peak = max(peak, int(re.search(r'VmRSS:\s+(\d+)', f.read()).group(1)) / 1024)
        time.sleep(0.02)
    stop.set()
    holder.join()
    times.sort()
    print('%-7s %d connections, %.0f s: %d messages, %d lost, p50 %.1f, p99 %.1f, slowest %.1f ms, RSS %.1f MB' % (
        kind, COUNT, SECONDS, len(times), lost, times[len(times) // 2] * 1e3, times[len(times) * 99 // 100] * 1e3,
        times[-1] * 1e3, peak), flush=True)
    return not lost and times[-1] < 10


def terminate(server, port):
    """SIGTERM while all the connections are held."""
    stop = threading.Event()
    holder = threading.Thread(target=hold, args=(('127.0.0.1', port), 'body', stop))
    holder.start()
    time.sleep(1)
    begin = time.monotonic()
    server.terminate()
    code, took = server.wait(20), time.monotonic() - begin
    stop.set()
    holder.join()
    print('SIGTERM under load: exit code %d after %.1f s' % (code, took), flush=True)
    return code == 0 and took <= 5.5


def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, COUNT + 1000), hard))
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, 'easywechat.py'), '--echo', '--port', '0'], cwd=folder,
            env=dict(os.environ, PYTHONIOENCODING='utf-8'), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)))
        line = next(line for line in server.stdout if '在监听'.encode() in line)
        port = int(re.search(rb':(\d+)/', line).group(1))
        good = [measure(kind, port, server.pid) for kind in KINDS]
        good.append(terminate(server, port))
    print('slow: %d passed, %d failed' % (sum(good), len(good) - sum(good)))
    return 0 if all(good) else 1


if __name__ == '__main__':
    sys.exit(main())
