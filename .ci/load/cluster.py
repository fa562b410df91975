"""One message, one run: cluster.py MESSAGES. gunicorn, Redis and nginx are real; the WeCom is examples/simulator.py.

Every speed (0.1, 6, 12, 20 s with WeCom's real 5 s) through the own server, gunicorn with 4 workers over a FileStore,
and nginx before two gunicorns over Redis. Then MESSAGES delivered twice at nearly the same time to different gunicorns;
then one gunicorn is killed in the middle; then Redis is stopped and started again in the middle.
Needs gunicorn and redis beside sys.executable, nginx and redis-server in PATH.
"""
import collections
import concurrent.futures
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, os.pardir, 'examples'))

import simulator  # noqa: E402

NGINX = '''
daemon off; master_process off; pid %(folder)s/nginx.pid; error_log %(folder)s/nginx.err;
events { worker_connections 1024; }
http {
    access_log off; client_body_temp_path %(folder)s/a; proxy_temp_path %(folder)s/b; fastcgi_temp_path %(folder)s/c;
    uwsgi_temp_path %(folder)s/d; scgi_temp_path %(folder)s/e;
    upstream bot { server 127.0.0.1:%(one)d; server 127.0.0.1:%(two)d; keepalive 16; }
    server {
        listen 127.0.0.1:%(port)d;
        location /weixin {
            proxy_pass http://bot; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_next_upstream error timeout non_idempotent;
        }
    }
}
'''


def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def wait_for(folder, port=None, path=None):
    for _ in range(200):
        with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as sock:
            if sock.connect_ex(path or ('127.0.0.1', port)) == 0:
                return
        time.sleep(0.05)
    with open(os.path.join(folder, 'log'), errors='replace') as f:
        raise SystemExit('nothing listens on %s\n%s' % (path or port, f.read()[-2000:]))


class Cluster:
    """The processes of one scenario, in a folder of their own."""

    def __init__(self, folder, secret=True):
        self.folder, self.processes, self.workers = folder, [], 0
        os.makedirs(folder)
        self.wecom = simulator.WeCom()
        self.wecom.users.update(('u%d' % n, 'somebody') for n in range(100))
        self.wecom.per_member = 10 ** 6
        settings = dict(self.wecom.settings, api_base=self.wecom.start())
        if not secret:
            settings['secret'] = ''
        self.env = dict(os.environ, RUNS=self.path('runs'), STORE=self.path('store'), XDG_CACHE_HOME=folder,
                        **{'EASYWECHAT_' + k.upper(): v for k, v in settings.items()})

    def path(self, name):
        return os.path.join(self.folder, name)

    def spawn(self, *args):
        with open(self.path('log'), 'ab') as log:
            process = subprocess.Popen(args, env=self.env, cwd=HERE, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    def own(self):
        port = free_port()
        self.spawn(sys.executable, 'bot.py', str(port))
        wait_for(self.folder, port)
        return port

    def gunicorn(self, workers):
        port = free_port()
        process = self.spawn(sys.executable, '-m', 'gunicorn', '-b', '127.0.0.1:%d' % port, '-k', 'gthread', '-w',
                             str(workers), '--threads', '32', '--graceful-timeout', '1', 'bot:server')
        wait_for(self.folder, port)
        self.workers += workers
        for _ in range(400):        # the port listens before the workers have begun
            with open(self.path('log')) as log:
                if log.read().count('ready') >= self.workers:
                    break
            time.sleep(0.05)
        return port, process

    def redis(self):
        path = self.path('redis.sock')
        self.env['STORE'] = 'redis:' + path
        process = self.spawn(shutil.which('redis-server'), '--port', '0', '--unixsocket', path, '--dir', self.folder,
                             '--save', '', '--appendonly', 'no')
        wait_for(self.folder, path=path)
        return process

    def nginx(self, one, two):
        port = free_port()
        with open(self.path('nginx.conf'), 'w') as f:
            f.write(NGINX % {'folder': self.folder, 'one': one, 'two': two, 'port': port})
        self.spawn(shutil.which('nginx'), '-c', self.path('nginx.conf'), '-p', self.folder)
        wait_for(self.folder, port)
        return port

    def runs(self):
        with contextlib.suppress(FileNotFoundError), open(self.path('runs')) as f:
            return f.read().split()
        return []

    def stop(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.wecom.stop()


def url(port):
    return 'http://127.0.0.1:%d/weixin' % port


def speeds(cluster, port, secret):
    """Every speed and kind at once, with WeCom's real 5 s → the rows that went wrong."""
    rows = [(seconds, kind) for seconds in (0.1, 6, 12, 20) for kind in ('text', 'event', 'five')
            if secret or (seconds < 15 and kind != 'five')]
    threads = []
    for n, (seconds, kind) in enumerate(rows):
        fields = {'MsgType': 'event', 'Event': 'click', 'EventKey': 'k'} if kind == 'event' else {}
        fields.update(Label='u%d' % n, Seconds=str(seconds), Kind=kind, user='u%d' % n)
        threads.append(threading.Thread(target=cluster.wecom.deliver, args=(url(port),), kwargs=fields))
        threads[-1].start()
    for thread in threads:
        thread.join()
    end = time.monotonic() + 25
    expected = {'u%d' % n: ['answer u%d %d' % (n, i) for i in range(5)] if kind == 'five' else ['answer u%d' % n]
                for n, (_, kind) in enumerate(rows)}
    while time.monotonic() < end:
        seen = {user: [content for _, content in cluster.wecom.inbox[user]] for user in expected}
        if seen == expected:
            break
        time.sleep(0.2)
    runs = collections.Counter(cluster.runs())
    return [(row, seen['u%d' % n], runs['u%d' % n]) for n, row in enumerate(rows)
            if seen['u%d' % n] != expected['u%d' % n] or runs['u%d' % n] != 1]


def all_speeds(folder):
    """The three ways at once, with and without secret."""
    clusters, jobs = [], []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name in 'own', 'gunicorn', 'nginx':
            for secret in True, False:
                cluster = Cluster(os.path.join(folder, '%s-%s' % (name, secret)), secret)
                clusters.append(cluster)
                if name == 'own':
                    port = cluster.own()
                elif name == 'gunicorn':
                    port = cluster.gunicorn(4)[0]
                else:
                    cluster.redis()
                    port = cluster.nginx(cluster.gunicorn(2)[0], cluster.gunicorn(2)[0])
                jobs.append((name, secret, pool.submit(speeds, cluster, port, secret)))
    failed = 0
    for name, secret, job in jobs:
        failed += bool(job.result())
        print('speeds through %-8s %s secret: %s' % (name, 'with' if secret else 'without',
                                                    job.result() or 'each ran once, each seen once, in order'))
    for cluster in clusters:
        cluster.stop()
    return failed


@contextlib.contextmanager
def two_gunicorns(folder):
    cluster = Cluster(folder, secret=False)
    try:
        redis = cluster.redis()
        (one, first), (two, _) = cluster.gunicorn(2), cluster.gunicorn(2)
        yield cluster, redis, first, one, two, cluster.nginx(one, two)
    finally:
        cluster.stop()


def twice(folder, count):
    """COUNT messages, each to both gunicorns at nearly the same time, and a tenth of them both through nginx."""
    with two_gunicorns(folder) as (cluster, _, _, one, two, front), \
            concurrent.futures.ThreadPoolExecutor(16) as pool:
        begin, jobs = time.monotonic(), []
        for n in range(count):
            message = cluster.wecom.message(MsgId=10 ** 9 + n)
            ports = (front, front) if n % 10 == 0 else (one, two)
            jobs.append([pool.submit(cluster.wecom.ask, url(port), message) for port in ports])
        equal = 0
        for n, pair in enumerate(jobs):
            replies = [cluster.wecom.opened(job.result()[1]) for job in pair]
            equal += 2 * (replies[0] == replies[1] and replies[0].get('Content') == 'answer %d' % (10 ** 9 + n))
        runs = cluster.runs()
        print('twice: %d messages, %d runs of the callback, %d equal answers, %.0f s' % (
            count, len(runs), equal, time.monotonic() - begin))
        return not len(runs) == len(set(runs)) == count == equal / 2


def breaking(folder, what, count=400):
    """Messages through nginx, three deliveries each, while WHAT breaks in the middle."""
    with two_gunicorns(folder) as (cluster, redis, first, _, _, front), \
            concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = []
        for n in range(count):
            jobs.append(pool.submit(cluster.wecom.deliver, url(front), MsgId=n + 1, Seconds='0.1'))
            time.sleep(0.01)
            if n == count // 3:
                os.killpg((first if what == 'gunicorn' else redis).pid, signal.SIGKILL)
            if n == count * 2 // 3 and what == 'Redis':
                os.unlink(cluster.path('redis.sock'))
                cluster.redis()
        unanswered = [n for n, job in enumerate(jobs) if (job.result() or {}).get('Content') != 'answer %d' % (n + 1)]
        runs = cluster.runs()
        print('%s killed in the middle: %d messages, %d unanswered, %d runs' % (
            what, count, len(unanswered), len(runs)))
        return bool(unanswered)


def frozen(folder):
    """Two processes over one FileStore, each message to both; one is stopped for 4 s while it runs some of them, then
    the folder is removed. No message may run twice, whoever is asked second answers when the first goes on."""
    cluster = Cluster(folder, secret=False)
    try:
        ports = cluster.own(), cluster.own()
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            def ask(port, message):     # as WeCom does: what is late is delivered again
                return (cluster.wecom.deliver(url(port), message) or {}).get('Content')

            def both(n):
                message = cluster.wecom.message(MsgId=n + 1, Seconds='0.3')
                first, second = ports if n % 2 else ports[::-1]
                early = pool.submit(ask, first, message)
                time.sleep(0.1)
                return 'answer %d' % (n + 1) in (ask(second, message), early.result())
            answered = 0
            for batch in range(3):
                jobs = [pool.submit(both, batch * 30 + n) for n in range(30)]
                if batch == 1:          # in the middle of them
                    time.sleep(0.2)
                    os.kill(cluster.processes[0].pid, signal.SIGSTOP)
                    time.sleep(4)
                    os.kill(cluster.processes[0].pid, signal.SIGCONT)
                answered += sum(job.result() for job in jobs)
                os.rename(cluster.path('store'), cluster.path('gone%d' % batch))     # they write into it: no rmtree
        runs = collections.Counter(cluster.runs())
        print('a process stopped for 4 s, the folder removed: %d messages, %d answered, %d runs, %d twice' % (
            90, answered, sum(runs.values()), sum(n > 1 for n in runs.values())))
        return max(runs.values()) > 1 or answered < 90
    finally:
        cluster.stop()


def main():
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        failed = all_speeds(os.path.join(folder, 'speeds'))
        failed += twice(os.path.join(folder, 'twice'), count)
        failed += breaking(os.path.join(folder, 'kill'), 'gunicorn')
        failed += breaking(os.path.join(folder, 'redis'), 'Redis')
        failed += frozen(os.path.join(folder, 'frozen'))
    print('cluster: %d passed, %d failed' % (10 - failed, failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
