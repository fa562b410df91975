"""Mixed traffic for a long time: soak.py [SECONDS], 600 by default, against a server in a process of its own.

Fast, slow (pushed), failing and repeated messages, several answers, garbage. Printed every tenth of the time: messages,
RSS, threads, descriptors. Between a fifth of the time and its end the RSS may grow by 1 MB (a failure at ten); threads
and descriptors return to rest.
"""
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, os.pardir, 'examples'))

import simulator  # noqa: E402

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 600
BOT = '''
import sys, time
sys.path.insert(0, %r)
import easywechat
server = easywechat.WeChatServer('soak')
kinds = {'slow': lambda: time.sleep(5) or 'slow', 'fail': lambda: 1 / 0, 'five': lambda: map(str, range(5)),
         'long': lambda: 'x' * 5000, 'none': lambda: None}
server.register_callback('*', lambda msg: kinds.get(msg['Content'], lambda: msg)())
easywechat.logging.getLogger('easywechat').setLevel('CRITICAL')
server.run('127.0.0.1', 0)
''' % os.path.join(HERE, os.pardir, os.pardir)


def figures(pid):
    with open('/proc/%d/status' % pid) as f:
        text = f.read()
    return (int(re.search(r'VmRSS:\s+(\d+)', text).group(1)) / 1024, int(re.search(r'Threads:\s+(\d+)', text).group(1)),
            len(os.listdir('/proc/%d/fd' % pid)))


def drive(wecom, url, stop, count):
    rng = random.Random(threading.get_ident())
    while not stop.is_set():
        kind = rng.choices(['fast', 'repeat', 'garbage', 'fail', 'five', 'long', 'none', 'slow'],
                           [60, 15, 15, 4, 1, 0.5, 2, 0.1])[0]
        count[kind] = count.get(kind, 0) + 1
        if kind == 'garbage':
            data = bytes(rng.getrandbits(8) for _ in range(rng.randint(1, 3000)))
            try:
                urllib.request.urlopen(url + '?nonce=%d' % rng.getrandbits(30), data, 5)
            except OSError:
                pass
            continue
        message = wecom.message(user='u%d' % rng.randrange(500), Content=kind)
        for _ in range(3 if kind == 'repeat' else 1):
            wecom.deliver(url, message)


def main():
    wecom = simulator.WeCom()
    wecom.users.update(('u%d' % n, 'somebody') for n in range(500))
    wecom.per_member = 10 ** 9
    env = dict(os.environ, EASYWECHAT_API_BASE=wecom.start(),
               **{'EASYWECHAT_' + k.upper(): v for k, v in wecom.settings.items()})
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, '-c', BOT], env=dict(env, XDG_CACHE_HOME=folder),
                                  stderr=subprocess.PIPE, cwd=folder)
        url = re.search(r'http://127\S+', server.stderr.readline().decode()).group()
        rest = figures(server.pid)
        stop, count = threading.Event(), {}
        threads = [threading.Thread(target=drive, args=(wecom, url, stop, count)) for _ in range(6)]
        for thread in threads:
            thread.start()
        begin, samples = time.monotonic(), []
        for n in range(10):
            time.sleep(max(0, begin + SECONDS * (n + 1) / 10 - time.monotonic()))
            samples.append(figures(server.pid))
            wecom.messages.clear(), wecom.inbox.clear(), wecom.calls.clear()
            print('%4.0f s: %d messages, RSS %.1f MB, %d threads, %d descriptors' % (
                (time.monotonic() - begin, sum(count.values())) + samples[-1]), flush=True)
        stop.set()
        for thread in threads:
            thread.join()
        time.sleep(16)          # the longest callback, and the kept threads' ten idle seconds
        end = figures(server.pid)
        server.terminate()
        code = server.wait(10)
    grown = samples[-1][0] - samples[1][0]
    print('soak: %s; RSS %+.2f MB between a fifth of the time and its end; at rest %d threads, %d descriptors before, '
          '%d, %d after; exit code %d' % (count, grown, rest[1], rest[2], end[1], end[2], code))
    bad = (grown > 10) + (end[1] > rest[1]) + (end[2] > rest[2] + 1) + (code != 0)
    print('soak: %d passed, %d failed' % (4 - bad, bad))
    return bad


if __name__ == '__main__':
    sys.exit(main())
