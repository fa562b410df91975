"""Ours beside what people use today, in one run: bench.py [ROUNDS [SECONDS [chart]]].

BESIDE=<commit> adds that commit's easywechat.py as two rows of its own, ONLY=<text> takes only the rows with that text.

An echo bot of text messages of 50 Chinese characters, each with its own MsgId; verified, decrypted, answered,
encrypted, signed. The server on one core, wrk on the other; `Connection: close`; 1, 8 and 64 connections. Each round
starts every server afresh, in turn; a warm-up; medians; ratios to the first row. Replies are sampled and decrypted.
Environments are thrown away. Then the codec alone, and on each Python found what an import costs and --echo holds.
"""
import contextlib
import glob
import hashlib
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'examples')]

import chart  # noqa: E402
import easywechat  # noqa: E402
import simulator  # noqa: E402

try:
    easywechat._aes()
except ImportError:         # in an environment that has it
    with tempfile.TemporaryDirectory() as own:
        subprocess.check_call([sys.executable, '-m', 'venv', own])
        subprocess.check_call([os.path.join(own, 'bin', 'pip'), '-q', 'install', 'pycryptodome'])
        sys.exit(subprocess.call([os.path.join(own, 'bin', 'python')] + sys.argv))

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
SECONDS = sys.argv[2] if len(sys.argv) > 2 else '2'
TEXT = '磁盘快满了,请看一看是不是日志太多。' * 3
#: An environment each, as people have it: what else is installed there can slow a start (cffi: 17 ms).
PACKAGES = {'ours': 'pycryptodome', 'original': 'flask xmltodict dicttoxml pycryptodome requests',
            'peers': 'flask wechatpy==2.0.0a26 werobot cryptography gunicorn waitress pycryptodome'}
OFFSETS = {1: 0, 8: 10000, 64: 25000}


def python_of(folder, env):
    return os.path.join(folder, env, 'bin', 'python')


def servers(folder):
    """name → the command, to which the port is added (or put where PORT stands)."""
    ours, original, peers = (python_of(folder, env) for env in PACKAGES)
    echo = ['--echo', '--host', '127.0.0.1', '--port']
    beside = {}
    if os.environ.get('BESIDE'):
        old = os.path.join(folder, 'beside')
        beside = {'%s of %s' % (how, os.environ['BESIDE']): ['env', 'PYTHONPATH=' + old, ours] + args + echo
                  for how, args in (('-m easywechat', ['-m', 'easywechat']),
                                    ('easywechat.py', [os.path.join(old, 'easywechat.py')]))}
    rows = {
        'original stack (Flask, xmltodict, dicttoxml)': [original, 'original.py'],
        'wechatpy on Flask': [peers, 'wechatpy_app.py'],
        'wechatpy on gunicorn gthread': [peers, '-m', 'gunicorn', '-k', 'gthread', '--threads', '16', '-b',
                                         '127.0.0.1:PORT', 'wechatpy_app:app'],
        'wechatpy on waitress': [peers, '-m', 'waitress', '--threads=16', '--listen=127.0.0.1:PORT',
                                 'wechatpy_app:app'],
        'WeRoBot on its own server': [peers, 'werobot_app.py'],
        'http.server as it comes, our codec': [ours, 'stock.py'],
        'Node, @wecom/crypto': ['node', 'node.js'],
        'Go, net/http by hand': [os.path.join(folder, 'server')],
        'python -m easywechat --echo': [ours, '-m', 'easywechat'] + echo,
        'python easywechat.py --echo': [ours, os.path.join(ROOT, 'easywechat.py')] + echo,
    }
    rows.update(beside)
    return {name: row for name, row in rows.items() if os.environ.get('ONLY', '') in name}


def tree(pid):
    """The process and its children."""
    pids = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir('/proc/%d/task' % pid):
            with open('/proc/%d/task/%s/children' % (pid, task)) as f:
                for child in f.read().split():
                    pids += tree(int(child))
    return pids


def memory(pid, field):
    total = 0
    for each in tree(pid):
        with open('/proc/%d/status' % each) as f:
            total += int(re.search(field + r':\s+(\d+)', f.read()).group(1))
    return total / 1024


def cpu(pid):
    ticks = 0
    for each in tree(pid):
        with open('/proc/%d/stat' % each) as f:
            ticks += sum(map(int, f.read().rpartition(')')[2].split()[11:13]))
    return ticks / os.sysconf('SC_CLK_TCK')


def request(wecom):
    """→ (query, body) of one message; WeRoBot wants 公众号's signature as well, the others pass over it."""
    query, body = wecom.request(wecom.message(Content=TEXT))
    given = dict(urllib.parse.parse_qsl(query))
    parts = sorted([wecom.settings['token'], given['timestamp'], given['nonce']])
    return query + '&signature=' + hashlib.sha1(''.join(parts).encode()).hexdigest(), body


def good_reply(wecom, url):
    query, body = request(wecom)
    post = urllib.request.Request(url + '?' + query, body, {'Content-Type': 'text/xml'})
    with urllib.request.urlopen(post, timeout=5) as response:
        return wecom.opened(response.read())['Content'] == TEXT


def first_reply(wecom, url, begin):
    """→ milliseconds from the start of the process to the first good reply."""
    while time.monotonic() - begin < 20:
        with contextlib.suppress(OSError):
            if good_reply(wecom, url):
                return (time.monotonic() - begin) * 1000
        time.sleep(0.005)
    raise SystemExit('no good reply from ' + url)


def wrk(url, connections, env):
    """→ (requests/s, p50 in ms, answers that were no 200)."""
    out = subprocess.check_output(
        ['taskset', '-c', '1', 'wrk', '-t1', '-c%d' % connections, '-d%ss' % SECONDS, '--latency', '-s',
         os.path.join(HERE, 'requests.lua'), url], env=dict(env, OFFSET=str(OFFSETS[connections]))).decode()
    p50, unit = re.search(r'50%\s+([0-9.]+)(us|ms|s)', out).groups()
    bad = re.search(r'Non-2xx or 3xx responses: (\d+)', out)
    return (float(re.search(r'Requests/sec:\s+([0-9.]+)', out).group(1)),
            float(p50) * {'us': 0.001, 'ms': 1, 's': 1000}[unit], int(bad.group(1)) if bad else 0)


def measure(name, command, wecom, env):
    """One server in one round → {column: figure}."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = str(sock.getsockname()[1])
    args = [a.replace('PORT', port) for a in command] if any('PORT' in a for a in command) else command + [port]
    url = 'http://127.0.0.1:%s/weixin' % port
    begin = time.monotonic()
    process = subprocess.Popen(['taskset', '-c', '0'] + args, env=env, cwd=HERE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        row = {'start ms': first_reply(wecom, url, begin), 'RSS idle': memory(process.pid, 'VmRSS')}
        for _ in range(50):             # warm-up
            good_reply(wecom, url)
        for connections in OFFSETS:
            before = cpu(process.pid)
            row['cl%d' % connections], p50, bad = wrk(url, connections, env)
            if bad:
                print('%s: %d bad answers at %d connections' % (name, bad, connections))
            if connections == 1:
                row['p50 ms'] = p50
            if connections == 8:
                row['CPU µs'] = (cpu(process.pid) - before) / (row['cl8'] * float(SECONDS)) * 1e6
        row['RSS peak'] = memory(process.pid, 'VmHWM')
        if not all(good_reply(wecom, url) for _ in range(20)):
            raise SystemExit('a wrong reply from ' + name)
        return row
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_requests(wecom, path):
    with open(path, 'w', encoding='utf-8') as f:
        for _ in range(40000):
            query, body = request(wecom)
            f.write('/weixin?%s %s\n' % (query, body.decode()))


def codec(python):
    """In process: verify, open, parse, build, seal, sign; ours against wechatpy's → microseconds each."""
    code = open(os.path.join(HERE, 'codec.py')).read()
    out = subprocess.check_output(['taskset', '-c', '1', python, '-c', code, ROOT]).decode().split()
    return float(out[0]), float(out[1]), float(out[0]) / float(out[1])


OWN = ('import re, resource, sys; status = open("/proc/self/status").read(); usage = resource.getrusage(0); '
       'print(usage.ru_utime + usage.ru_stime, re.search("VmRSS:[^0-9]*([0-9]+)", status).group(1), len(sys.modules))')


def imports(python, env):
    """`import easywechat` over the bare interpreter, from its .pyc → (ms CPU, MB, modules)."""
    def run(code):
        rows = [list(map(float, subprocess.check_output([python, '-c', code + OWN], env=env).split()))
                for _ in range(9)]
        return [statistics.median(column) for column in zip(*rows)]
    bare, ours = run(''), run('import easywechat; ')
    return (ours[0] - bare[0]) * 1000, (ours[1] - bare[1]) / 1024, ours[2] - bare[2]


def small(folder, env):
    """On each Python found: what an import costs, what --echo holds at rest and after 1,000 connections."""
    wecom = simulator.WeCom()
    wecom.settings.update(easywechat._DEMO)
    for path in sorted(glob.glob(os.path.expanduser('~/.pyenv/versions/3.*/bin/python')), key=version_of):
        if version_of(path)[:2] not in ((3, 8), (3, 11), (3, 13)):
            continue
        python = os.path.join(folder, 'python%d%d' % version_of(path)[:2], 'bin', 'python')
        subprocess.check_call([path, '-m', 'venv', os.path.dirname(os.path.dirname(python))])
        subprocess.check_call([python, '-m', 'pip', '-q', 'install', 'pycryptodome'], stderr=subprocess.DEVNULL)
        subprocess.check_call([python, '-c', 'import easywechat'], env=env)
        print('Python %d.%d.%d: import %.0f ms CPU, %.1f MB, %d modules over the bare interpreter' % (
            version_of(path) + imports(python, env)))
        for name in '-m easywechat', os.path.join(ROOT, 'easywechat.py'):
            process = subprocess.Popen([python] + name.split() + ['--echo', '--port', '0'], env=env,
                                       stdout=subprocess.PIPE, cwd=folder)
            line = ''
            while '在监听' not in line:
                line = process.stdout.readline().decode()
            time.sleep(0.3)
            idle, url = memory(process.pid, 'VmRSS'), re.search(r'http://\S+', line).group()
            if not all(good_reply(wecom, url) for _ in range(1000)):
                raise SystemExit('a wrong reply')
            print('    python %s --echo: %.1f MB at rest, %.1f MB after 1,000 connections' % (
                os.path.basename(name), idle, memory(process.pid, 'VmRSS')), flush=True)
            process.kill()
            process.wait()


def version_of(path):
    return tuple(map(int, re.search(r'/(\d+)\.(\d+)\.(\d+)/', path).groups()))


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name, packages in PACKAGES.items():
            subprocess.check_call([sys.executable, '-m', 'venv', os.path.join(folder, name)])
            subprocess.check_call([python_of(folder, name), '-m', 'pip', '-q', 'install'] + packages.split(),
                                  stderr=subprocess.DEVNULL)
        if shutil.which('npm'):
            subprocess.check_call(['npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', folder,
                                   '@wecom/crypto@1.0.1'], stdout=subprocess.DEVNULL)
        subprocess.check_call(['go', 'build', '-o', folder, 'server.go'], cwd=HERE,
                              env=dict(os.environ, GOCACHE=folder))
        if os.environ.get('BESIDE'):
            os.mkdir(os.path.join(folder, 'beside'))
            with open(os.path.join(folder, 'beside', 'easywechat.py'), 'wb') as f:
                f.write(subprocess.check_output(['git', 'show', os.environ['BESIDE'] + ':easywechat.py'], cwd=ROOT))
        wecom = simulator.WeCom()
        wecom.settings['secret'] = ''
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'}
        env.update({'EASYWECHAT_' + k.upper(): v for k, v in wecom.settings.items() if v}, XDG_CACHE_HOME=folder,
                   REQUESTS=os.path.join(folder, 'requests'), NODE_PATH=os.path.join(folder, 'node_modules'),
                   PYTHONPATH=ROOT, TMPDIR=folder)
        rows = {name: [] for name in servers(folder)}
        for n in range(ROUNDS):
            write_requests(wecom, env['REQUESTS'])
            for name, command in servers(folder).items():
                rows[name].append(measure(name, command, wecom, env))
            print('round %d of %d' % (n + 1, ROUNDS), file=sys.stderr, flush=True)
        table = {name: {key: statistics.median(row[key] for row in got) for key in got[0]}
                 for name, got in rows.items()}
        print_table(table, folder)
        print('codec in process: ours %.0f µs, wechatpy %.0f µs (%.2f)' % codec(python_of(folder, 'peers')))
        small(folder, {k: v for k, v in env.items() if not k.startswith('EASYWECHAT_')})
        if len(sys.argv) > 3:
            first = next(iter(table.values()))['cl8']
            chart.keep('回调 URL：8 个连接时每秒回话的条数，服务器占一个核，旧版的一套是 1', [
                [name, round(row['cl8'] / first, 1), 'easywechat' in name] for name, row in table.items()])


def print_table(table, folder):
    with open('/proc/cpuinfo') as f:
        model = re.search('model name\\s*: (.*)', f.read())
    freeze = {line for env in PACKAGES for line in subprocess.check_output(
        [python_of(folder, env), '-m', 'pip', 'freeze']).decode().split()}
    print('%s, %s, Python %s, Node %s, %s, %d rounds of %s s\n%s' % (
        time.strftime('%Y-%m-%d'), model.group(1) if model else platform.machine(), platform.python_version(),
        subprocess.check_output(['node', '--version']).decode().strip(),
        subprocess.check_output(['go', 'version']).decode().split()[2], ROUNDS, SECONDS, ' '.join(sorted(freeze))))
    columns = ['cl1', 'cl8', 'cl64', 'p50 ms', 'CPU µs', 'RSS idle', 'RSS peak', 'start ms']
    first = next(iter(table.values()))
    print('%-46s' % '' + ''.join('%16s' % c for c in columns))
    for name, row in table.items():
        print('%-46s' % name + ''.join('%16s' % ('%.1f (%.2f)' % (row[c], row[c] / first[c])) for c in columns))


if __name__ == '__main__':
    main()
