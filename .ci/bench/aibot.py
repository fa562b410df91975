"""Our long connection beside other SDKs of it, in one run: aibot.py [ROUNDS [SECONDS [STREAM_SECONDS [chart]]]].

Each is a process of its own on core 0 that answers every text with itself, as one finished stream frame; the server,
one for all, is this process on core 1: TLS, no compression, every frame acked at once. Medians of ROUNDS (3) rounds of
SECONDS (3) each; the starts are always seven. Then a stream of 1,000 pieces that come over STREAM_SECONDS (30), and one
at full speed: every piece is a frame with the SDKs, ours joins them. The SDKs' loggers are silenced. No gate.
ONLY=ours takes those whose name begins so; BESIDE=<commit> adds that commit.
"""
import asyncio
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time

import chart

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PACKAGES = {'ours': 'pycryptodome', 'official': 'wecom-aibot-python-sdk==1.0.2', 'community': 'wecom-aibot-sdk==1.0.8'}
NAMES = {'official': 'official Python SDK 1.0.2', 'community': 'community Python SDK 1.0.8',
         'node': 'official Node SDK 1.0.7', 'ours': 'easywechat.py',
         'beside': 'easywechat.py of ' + os.environ.get('BESIDE', '')}
TEXT = '磁盘快满了,请看一看是不是日志太多。' * 3
PIECES = 1000
LOG = open(os.environ['LOG'], 'a') if 'LOG' in os.environ else subprocess.DEVNULL


# the bots: ours as a child process (python -c), so that easywechat.py has its .pyc; theirs are this file

OURS = '''
import time
import easywechat
server = easywechat.WeChatServer('bench')
@server.register_callback('text')
def answer(msg):
    if not msg['Content'].startswith('stream'):
        return msg['Content']
    def pieces(pause):
        for n in range(%d):
            time.sleep(pause)
            yield '一片%%03d' %% n
    return easywechat.Stream(pieces(float(msg['Content'].split()[1])))
server.bot.per_minute = server.bot.per_hour = 10 ** 9
server.run()
''' % PIECES
NODE = '''
const { WSClient } = require('@wecom/aibot-node-sdk');
const quiet = { debug() {}, info() {}, warn() {}, error() {} };
const client = new WSClient({ botId: 'aibDUMMY', secret: 'SECRETDUMMY', wsUrl: process.argv[1], logger: quiet });
let count = 0;
client.on('message.text', async (frame) => {
  const text = frame.body.text.content, id = 's' + ++count;
  if (!text.startsWith('stream')) return client.replyStream(frame, id, text, true);
  let whole = '';
  for (let n = 0; n < %d; n++) {
    await new Promise((done) => setTimeout(done, 1000 * text.split(' ')[1]));
    whole += '一片' + String(n).padStart(3, '0');
    await client.replyStream(frame, id, whole, n === %d);
  }
});
client.connect();
''' % (PIECES, PIECES - 1)


class Quiet:
    def debug(self, *args):
        pass
    info = warn = error = debug


def official(url, ca):
    from aibot import WSClient, WSClientOptions, ws
    ws._SSL_CONTEXT.load_verify_locations(ca)
    return WSClient(WSClientOptions(bot_id='aibDUMMY', secret='SECRETDUMMY', ws_url=url, logger=Quiet()))


def community(url, ca):
    from wecom_aibot_sdk import WSClient
    return WSClient('aibDUMMY', 'SECRETDUMMY', ws_url=url, logger=Quiet())


async def sdk(make, url, ca):
    client, count = make(url, ca), 0

    async def told(frame):
        nonlocal count
        count += 1
        text, own, whole = frame['body']['text']['content'], 's%d' % count, ''
        if not text.startswith('stream'):
            return await client.reply_stream(frame, own, text, True)
        for n in range(PIECES):
            await asyncio.sleep(float(text.split()[1]))
            whole += '一片%03d' % n
            await client.reply_stream(frame, own, whole, n == PIECES - 1)
    client.on('message.text', told)
    await client.connect()
    await asyncio.Event().wait()


# the server: as little as can be between the bot's frames and ours

class Connection(asyncio.Protocol):
    """One bot. ``heard(connection, bytes)`` gets what it says."""
    def __init__(self, heard):
        self._heard, self._buffer, self._shaken = heard, bytearray(), False
        self.frames = self.bytes = 0

    def connection_made(self, transport):
        self._transport = transport

    def send(self, data):
        head = bytes([0x81, len(data)]) if len(data) < 126 else b'\x81\x7e' + len(data).to_bytes(2, 'big')
        self._transport.write(head + data)

    def data_received(self, data):
        self._buffer += data
        if not self._shaken:
            head, found, rest = bytes(self._buffer).partition(b'\r\n\r\n')
            if not found:
                return
            key = re.search(rb'(?i)sec-websocket-key: (\S+)', head).group(1)
            accept = base64.b64encode(hashlib.sha1(key + b'258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest())
            self._transport.write(b'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
                                  b'Sec-WebSocket-Accept: ' + accept + b'\r\n\r\n')
            self._buffer, self._shaken = bytearray(rest), True
        while True:
            data = self._buffer
            if len(data) < 6:
                return
            size, at = data[1] & 127, 2
            if size > 125:
                at = 4 if size == 126 else 10
                size = int.from_bytes(data[2:at], 'big')
            if len(data) < at + 4 + size:
                return
            mask, body = bytes(data[at:at + 4]), data[at + 4:at + 4 + size]
            opcode = data[0] & 15
            del data[:at + 4 + size]
            if opcode == 1:
                key = (mask * (size // 4 + 1))[:size]
                body = (int.from_bytes(body, 'big') ^ int.from_bytes(key, 'big')).to_bytes(size, 'big')
                self.frames, self.bytes = self.frames + 1, self.bytes + size
                self._heard(self, body)


class Gateway:
    """What all the bots connect to, one after the other. It must be faster than they are, so it hardly reads."""
    req_id = re.compile(rb'"req_id": ?"([^"]+)"')
    finish = re.compile(rb'"finish": ?true')
    texts = TEXT.encode(), json.dumps(TEXT).encode()

    def __init__(self):
        self.connection, self.subscribed, self.count, self.over = None, asyncio.Event(), 0, None
        self._flying = self._until = self._serial = 0

    def heard(self, connection, data):
        req_id = self.req_id.search(data).group(1)
        connection.send(b'{"headers":{"req_id":"%s"},"errcode":0,"errmsg":"ok"}' % req_id)
        if not self.finish.search(data):
            if b'"aibot_subscribe"' in data:
                self.connection = connection
                self.subscribed.set()
        elif req_id.startswith(b'stream'):
            self.over.set_result(json.loads(data)['body']['stream']['content'])
        else:
            if not any(text in data for text in self.texts):
                raise SystemExit('a wrong answer: %r' % data)
            self.count += 1
            self._flying -= 1
            if time.monotonic() < self._until:
                self.say(TEXT)
            elif not self._flying:
                self.over.set_result(None)

    def say(self, text, kind='text'):
        self._flying += 1
        self._serial += 1
        self.connection.send((
            '{"cmd":"aibot_msg_callback","headers":{"req_id":"%s-%d"},"body":{"msgid":"m%d-%d","aibotid":"aibDUMMY",'
            '"chattype":"single","from":{"userid":"u%d"},"msgtype":"text","text":{"content":"%s"}}}' % (
                kind, self._serial, os.getpid(), self._serial, self._serial % 499, text)).encode())

    async def load(self, flying, seconds):
        """Keep so many messages in flight → round trips."""
        self.over, self.count, self._flying = asyncio.get_running_loop().create_future(), 0, 0
        self._until = time.monotonic() + seconds
        for _ in range(flying):
            self.say(TEXT)
        await asyncio.wait_for(self.over, seconds + 20)
        return self.count

    async def stream(self, pause):
        """→ (frames, bytes, seconds) of one stream."""
        self.over = asyncio.get_running_loop().create_future()
        frames, size, begin = self.connection.frames, self.connection.bytes, time.monotonic()
        self.say('stream %g' % pause, 'stream')
        text = await asyncio.wait_for(self.over, PIECES * pause + 60)
        if text != ''.join('一片%03d' % n for n in range(PIECES)):
            raise SystemExit('a wrong stream: %r' % text)
        return self.connection.frames - frames, self.connection.bytes - size, time.monotonic() - begin


# what a process uses

def status(pid, field):
    with open('/proc/%d/status' % pid) as f:
        return int(re.search(field + r':\s+(\d+)', f.read()).group(1))


def wake_ups(pid):
    total = 0
    for task in os.listdir('/proc/%d/task' % pid):
        with open('/proc/%d/task/%s/status' % (pid, task)) as f:
            total += int(re.search(r'\nvoluntary_ctxt_switches:\s+(\d+)', f.read()).group(1))
    return total


def cpu(pid):
    with open('/proc/%d/stat' % pid) as f:
        return sum(map(int, f.read().rpartition(')')[2].split()[11:13])) / os.sysconf('SC_CLK_TCK')


class Peer:
    """One bot and how it is started."""
    def __init__(self, gateway, name, command, env):
        self._gateway, self.name, self._command, self._env = gateway, name, command, env
        self.starts, self.rows, self.rest, self.streams = [], [], {}, []

    async def start(self):
        self._gateway.subscribed.clear()
        begin = time.monotonic()
        pinned = ['taskset', '-c', '0'] * bool(shutil.which('taskset'))
        self._process = subprocess.Popen(pinned + self._command, cwd='/', env=self._env, stdout=subprocess.DEVNULL,
                                         stderr=LOG)
        await asyncio.wait_for(self._gateway.subscribed.wait(), 20)
        self.starts.append((time.monotonic() - begin) * 1000)

    def end(self):
        self._process.kill()
        self._process.wait()

    async def load(self, seconds):
        pid, row = self._process.pid, {}
        await self._gateway.load(4, 0.5)        # warm-up
        for flying in 1, 8:
            before = cpu(pid)
            count = await self._gateway.load(flying, seconds)
            row['echo %d' % flying] = count / seconds
            row['CPU µs %d' % flying] = (cpu(pid) - before) / count * 1e6
        self.rows.append(row)

    async def idle(self, seconds=20):
        """At rest: after what the start and the first answers leave behind."""
        await asyncio.sleep(4)
        pid = self._process.pid
        before = wake_ups(pid)
        await asyncio.sleep(seconds)
        self.rest = {'RSS idle': status(pid, 'VmRSS') / 1024, 'threads': status(pid, 'Threads'),
                     'wake-ups': wake_ups(pid) - before}

    async def stream(self, seconds):
        for pause in seconds / PIECES, 0:
            before = cpu(self._process.pid)
            frames, size, took = await self._gateway.stream(pause)
            self.streams.append((frames, size / 1024, took, (cpu(self._process.pid) - before) * 1000))


def certificate(folder):
    ca, key = os.path.join(folder, 'ca.pem'), os.path.join(folder, 'ca.key')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost',
                    '-addext', 'subjectAltName=DNS:localhost', '-keyout', key, '-out', ca], check=True,
                   stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, key)
    return ca, context


def peers(folder, gateway, url, ca):
    """Environments of their own, as people have them: what else is installed can slow a start."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE' and 'proxy' not in k.lower()}
    env.update(SSL_CERT_FILE=ca, NODE_EXTRA_CA_CERTS=ca, PYTHONPATH=os.path.join(folder, 'now'), XDG_CACHE_HOME=folder,
               EASYWECHAT_BOT_ID='aibDUMMY', EASYWECHAT_BOT_SECRET='SECRETDUMMY', EASYWECHAT_BOT_URL=url)
    for name, data in ('now', None), ('beside', os.environ.get('BESIDE')):
        os.mkdir(os.path.join(folder, name))
        with open(os.path.join(folder, name, 'easywechat.py'), 'wb') as f:
            f.write(subprocess.check_output(['git', 'show', data + ':easywechat.py'], cwd=ROOT) if data else
                    open(os.path.join(ROOT, 'easywechat.py'), 'rb').read())
    for name in ['official', 'community', 'node', 'ours'] + ['beside'] * bool(os.environ.get('BESIDE')):
        if not name.startswith(os.environ.get('ONLY', '')) or name == 'node' and not shutil.which('npm'):
            continue
        own = os.path.join(folder, name)
        python = os.path.join(folder, 'ours' if name == 'beside' else name, 'bin', 'python')
        if name == 'node':
            subprocess.run(['npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', own,
                            '@wecom/aibot-node-sdk@1.0.7'], check=True, stdout=subprocess.DEVNULL)
            env = dict(env, NODE_PATH=os.path.join(own, 'node_modules'))
            yield Peer(gateway, name, ['node', '-e', NODE, url], env)
        elif name == 'beside':
            yield Peer(gateway, name, [python, '-c', OURS], dict(env, PYTHONPATH=own))
        else:
            subprocess.run([sys.executable, '-m', 'venv', own], check=True)
            subprocess.run([python, '-m', 'pip', '-q', 'install', '--disable-pip-version-check', PACKAGES[name]],
                           check=True, stderr=subprocess.DEVNULL)
            yield Peer(gateway, name, [python, '-c', OURS] if name == 'ours' else
                       [python, os.path.abspath(__file__), 'bot', name, url, ca], env)


async def main(rounds, seconds, stream_seconds):
    if hasattr(os, 'sched_setaffinity') and os.cpu_count() > 1:
        os.sched_setaffinity(0, {1})
    gateway = Gateway()
    with tempfile.TemporaryDirectory() as folder:
        ca, context = certificate(folder)
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(gateway.heard), 'localhost', 0, ssl=context)
        url = 'wss://localhost:%d' % server.sockets[0].getsockname()[1]
        rows = list(peers(folder, gateway, url, ca))
        for n in range(max(8, rounds)):         # the very first start compiles
            for peer in rows:
                await peer.start()
                if n < rounds:
                    await peer.load(seconds)
                peer.end()
            print('start %d' % (n + 1), file=sys.stderr, flush=True)
        for peer in rows:
            await peer.start()
            await peer.idle()
            if stream_seconds:
                await peer.stream(stream_seconds)
            peer.end()
        server.close()
    print_table(rows)


def print_table(rows):
    with open('/proc/cpuinfo') as f:
        model = re.search('model name\\s*: (.*)', f.read())
    print('%s, %s, Python %s' % (time.strftime('%Y-%m-%d'), model.group(1) if model else platform.machine(),
                                 platform.python_version()))
    table = {peer.name: dict({'start ms': statistics.median(peer.starts[1:])}, **{
        key: statistics.median(row[key] for row in peer.rows) for key in peer.rows[0]}, **peer.rest) for peer in rows}
    first = next(iter(table.values()))
    print('%-28s' % '' + ''.join('%16s' % column for column in first))
    for name, row in table.items():
        print('%-28s' % NAMES[name] + ''.join(
            '%16s' % ('%.1f (%.2f)' % (value, value / (first[column] or 1))) for column, value in row.items()))
    for peer in rows:
        print('%s: first start %.0f ms' % (NAMES[peer.name], peer.starts[0]) + ''.join(
            '; stream of %d pieces %s: %d frames, %.0f KiB, %.1f s, CPU %.0f ms' % ((PIECES, how) + figures)
            for how, figures in zip(('over a while', 'at full speed'), peer.streams)))
    if sys.argv[4:] == ['chart']:
        chart.keep('智能机器人的长连接：空闲时的内存，MB', [
            [NAMES[name], round(row['RSS idle'], 1), name == 'ours'] for name, row in table.items()])
    if 'ours' in table and len(table) > 1:
        ours = table['ours']
        ratios = [ours[key] / first[key] for key in ('echo 8', 'echo 1', 'CPU µs 8', 'CPU µs 1', 'start ms')]
        print('aibot bench: echo %.2f × (8 in flight), %.2f × (1), CPU %.2f ×, %.2f ×, start %.2f ×; RSS %.1f MB, '
              '%d threads, %d wake-ups at rest' % (*ratios, ours['RSS idle'], ours['threads'], ours['wake-ups']))


if __name__ == '__main__':
    if sys.argv[1:2] == ['bot']:
        sys.path.remove(HERE)           # the official SDK's module is called aibot, too
        asyncio.run(sdk({'official': official, 'community': community}[sys.argv[2]], *sys.argv[3:]))
    else:
        given = list(map(float, sys.argv[1:4]))
        asyncio.run(main(int((given + [3])[0]), (given[1:] + [3])[0], (given[2:] + [30])[0]))
