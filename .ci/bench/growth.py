"""How the cost of a message grows: growth.py. Sizes, connections, users: server CPU for each message.

The server on one core, the load on the other; every message is verified, decrypted, claimed and answered. A failure is
a step that costs more than three times what a linear one would.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, os.pardir, os.pardir)
sys.path[:0] = [ROOT, os.path.join(ROOT, 'examples')]

import simulator  # noqa: E402

BOT = '''
import sys
sys.path.insert(0, %r)
import easywechat
server = easywechat.WeChatServer('growth')
server.register_callback('*', lambda msg: '好')
server.run('127.0.0.1', 0)
''' % ROOT


class Server:
    """A fresh server process on core 0."""

    def __init__(self, wecom, folder):
        env = dict(os.environ, XDG_CACHE_HOME=folder,
                   **{'EASYWECHAT_' + k.upper(): v for k, v in wecom.settings.items() if v})
        self.process = subprocess.Popen(['taskset', '-c', '0', sys.executable, '-c', BOT], env=env, cwd=folder,
                                        stderr=subprocess.PIPE)
        self.url = re.search(r'http://127\S+', self.process.stderr.readline().decode()).group()

    def cpu(self):
        """Microseconds so far, of all threads."""
        with open('/proc/%d/stat' % self.process.pid) as f:
            return sum(map(int, f.read().rpartition(')')[2].split()[11:13])) * 1e6 / os.sysconf('SC_CLK_TCK')

    def rss(self):
        with open('/proc/%d/status' % self.process.pid) as f:
            return int(re.search(r'VmRSS:\s+(\d+)', f.read()).group(1)) / 1024

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


def post(server, query, body):
    request = urllib.request.Request(server.url + '?' + query, body, {'Content-Type': 'text/xml'})
    with urllib.request.urlopen(request, timeout=10) as response:
        if response.status != 200 or not response.read():
            raise SystemExit('no answer')


def sizes(wecom, folder):
    """Bodies of 256 B of text to almost max_body → [(size, µs)]."""
    rows = []
    for size, count in (256, 2000), (2048, 2000), (65536, 300), (760000, 40):
        requests = [wecom.request(wecom.message(Content='x' * size)) for _ in range(count)]
        server = Server(wecom, folder)
        post(server, *requests.pop())
        before = server.cpu()
        for request in requests:
            post(server, *request)
        rows.append((size, (server.cpu() - before) / len(requests)))
        print('a text of %6d bytes: %6.0f µs, RSS %.1f MB' % (rows[-1] + (server.rss(),)), flush=True)
        server.stop()
    return rows


def connections(wecom, folder):
    """1 to 512 connections at a time, by wrk → [(connections, µs)]."""
    path, rows = os.path.join(folder, 'requests'), []
    for count in 1, 8, 64, 512:
        with open(path, 'w') as f:
            for _ in range(15000):
                query, body = wecom.request(wecom.message(Content='状态'))
                f.write('/weixin?%s %s\n' % (query, body.decode()))
        server = Server(wecom, folder)
        before = server.cpu()
        out = subprocess.check_output(
            ['taskset', '-c', '1', 'wrk', '-t1', '-c%d' % count, '-d3s', '--latency', '-s',
             os.path.join(HERE, 'requests.lua'), server.url], env=dict(os.environ, REQUESTS=path, OFFSET='0')).decode()
        done = int(re.search(r'(\d+) requests in', out).group(1))
        rows.append((count, (server.cpu() - before) / done))
        bad = re.search(r'Socket errors: (.*)', out)
        found = tuple(re.search(form, out).group(1)
                      for form in (r'Requests/sec:\s+([0-9]+)', r'50%\s+(\S+)', r'99%\s+(\S+)'))
        print('%3d connections: %6.0f µs, %s requests/s, p50 %s, p99 %s, RSS %.1f MB%s' % (
            rows[-1] + found + (server.rss(), ', errors: ' + bad.group(1) if bad else '')), flush=True)
        server.stop()
    return rows


def users(wecom, folder):
    """10 to 10,000 users, each with a claim in the table; then 2,000 messages of theirs → [(users, µs)]."""
    rows = []
    for count in 10, 100, 1000, 10000:
        server = Server(wecom, folder)
        for n in range(count):
            post(server, *wecom.request(wecom.message(user='u%d' % n, Content='状态')))
        requests = [wecom.request(wecom.message(user='u%d' % (n * 7919 % count), Content='状态'))
                    for n in range(2000)]
        before = server.cpu()
        for request in requests:
            post(server, *request)
        rows.append((count, (server.cpu() - before) / 2000))
        print('%5d users: %6.0f µs, RSS %.1f MB' % (rows[-1] + (server.rss(),)), flush=True)
        server.stop()
    return rows


def main():
    wecom, bad = simulator.WeCom(), 0
    wecom.settings['secret'] = ''
    print('%s, Python %s' % (time.strftime('%Y-%m-%d'), sys.version.split()[0]))
    with tempfile.TemporaryDirectory() as folder:
        for measure in sizes, connections, users:
            rows = measure(wecom, folder)
            for (less, cheap), (more, dear) in zip(rows, rows[1:]):
                # what a message costs may grow with its size, not with the number of others
                bad += dear / cheap > 3 * (more / less if measure is sizes else 1)
    print('growth: %d passed, %d failed' % (9 - bad, bad))
    return bad


if __name__ == '__main__':
    sys.exit(main())
