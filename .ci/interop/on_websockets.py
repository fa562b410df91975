"""Our long connection against a server written on PyPI's `websockets`, which must be installed.

What WebSocket has and WeCom's own gateway uses sparingly: protocol pings, fragments, close codes, TLS with a CA of its
own, a CONNECT proxy with and without Basic auth. Times are scaled; nothing leaves this machine.
"""
import asyncio
import base64
import contextlib
import json
import logging
import os
import ssl
import subprocess
import sys
import tempfile

import websockets
from websockets.asyncio.server import serve

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

import easywechat  # noqa: E402

DATA = os.urandom(1300000)
USER = '用户', 'p:ss w@rd'


class Gateway:
    """The server's side: lets the bot subscribe, acks everything, remembers all frames."""
    def __init__(self):
        self.socket, self.frames = None, []
        self.chunks, self._news = {}, asyncio.Condition()

    async def handle(self, websocket):
        async for text in websocket:
            frame = json.loads(text)
            cmd, body, more = frame['cmd'], frame.get('body'), {}
            if cmd == 'aibot_subscribe':
                assert body == {'bot_id': 'aibDUMMY', 'secret': 'SECRETDUMMY'}
                self.socket = websocket
            elif cmd == 'aibot_upload_media_init':
                self.chunks.clear()
                more = {'body': {'upload_id': 'U1'}}
            elif cmd == 'aibot_upload_media_chunk':
                self.chunks[body['chunk_index']] = base64.b64decode(body['base64_data'])
            elif cmd == 'aibot_upload_media_finish':
                more = {'body': {'type': 'file', 'media_id': 'M1', 'created_at': '1700000000'}}
            await websocket.send(json.dumps(dict({'headers': frame['headers'], 'errcode': 0, 'errmsg': 'ok'}, **more)))
            async with self._news:
                self.frames.append(frame)
                self._news.notify_all()

    async def until(self, condition):
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(condition), 10)

    async def said(self, cmd, **body):
        """Wait for such a frame, take it out of those that came."""
        def good(f):
            return f['cmd'] == cmd and all(f['body'].get(k) == v for k, v in body.items())
        await self.until(lambda: any(map(good, self.frames)))
        frame = next(filter(good, self.frames))
        self.frames.remove(frame)
        return frame

    def message(self, req_id, text):
        return json.dumps({'cmd': 'aibot_msg_callback', 'headers': {'req_id': req_id}, 'body': {
            'msgid': 'm-' + req_id, 'aibotid': 'aibDUMMY', 'chattype': 'single', 'from': {'userid': 'li.lei'},
            'msgtype': 'text', 'text': {'content': text}}}, ensure_ascii=False)

    async def answer(self, req_id):
        """→ the frames of its stream, up to the last."""
        def frames():
            return [f for f in self.frames if f['headers']['req_id'] == req_id]
        await self.until(lambda: any(f['body']['stream']['finish'] for f in frames()))
        return [f['body']['stream'] for f in frames()]


class Proxy:
    """CONNECT and nothing else. ``asked`` are the heads that came."""
    def __init__(self, user=None):
        self.asked, self._user = [], user

    async def handle(self, reader, writer):
        head = (await reader.readuntil(b'\r\n\r\n')).decode()
        self.asked.append(head)
        good = base64.b64encode(':'.join(self._user).encode()).decode() if self._user else ''
        if good and 'Proxy-Authorization: Basic %s\r\n' % good not in head:
            writer.write(b'HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n')
            return writer.close()
        host, port = head.split()[1].rsplit(':', 1)
        up, down = await asyncio.open_connection(host, port)
        writer.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
        await asyncio.gather(pump(up, writer), pump(reader, down), return_exceptions=True)


async def pump(reader, writer):
    with contextlib.suppress(OSError):
        while True:
            data = await reader.read(65536)
            if not data:
                break
            writer.write(data)
            await writer.drain()
    writer.close()


def answer(msg):
    text = msg['Content']
    return easywechat.Stream('一二三') if text == '流' else '听到 ' + text[:6000] + '…' * (len(text) > 6000)


@contextlib.contextmanager
def bot(url, **settings):
    server = easywechat.WeChatServer('websockets', bot_id='aibDUMMY', bot_secret='SECRETDUMMY', bot_url=url, **settings)
    vars(server.bot).update(pause=0.05, pause_most=0.2, ping_every=0.5, silent_within=1.5, frame_every=0.05)
    server.register_callback('text', answer)
    server.start()
    try:
        yield server
    finally:
        server.stop()


async def both_ways(gateway, server, tls):
    """Everything that is said on one connection (generator of sentences)."""
    await gateway.until(lambda: gateway.socket)
    await gateway.socket.send(gateway.message('R1', '你好'))
    assert [s['content'] for s in await gateway.answer('R1')] == ['听到 你好']
    yield 'text both ways'
    await gateway.socket.send(gateway.message('R2', '流'))
    assert (await gateway.answer('R2'))[-1]['content'] == '一二三'
    yield 'a stream'
    await asyncio.to_thread(server.send, '**推**', 'li.lei')
    await gateway.said('aibot_send_msg', chatid='li.lei', msgtype='markdown', markdown={'content': '**推**'})
    yield 'a push'
    assert await asyncio.to_thread(server.bot.upload, DATA, None, 'a.bin') == 'M1'
    assert b''.join(gateway.chunks[n] for n in sorted(gateway.chunks)) == DATA and len(gateway.chunks) == 3
    yield 'an upload of 1.3 MB'
    for payload in b'', 'alive?'.encode(), b'x' * 125:
        await asyncio.wait_for(await gateway.socket.ping(payload), 5)
    yield 'protocol pings'
    text = gateway.message('R3', '片' * 3000)
    parts = [text[:1], text[1:300], '', *(text[n:n + 1000] for n in range(300, len(text), 1000))]

    async def slowly():                 # a ping between any two of them
        for n, part in enumerate(parts):
            yield part
            if n < len(parts) - 1:
                await asyncio.wait_for(await gateway.socket.ping(), 5)
    await gateway.socket.send(slowly())
    assert (await gateway.answer('R3'))[0]['content'] == '听到 ' + '片' * 3000
    yield 'fragments'
    await gateway.socket.send(gateway.message('R4', '大' * 400000))
    assert (await gateway.answer('R4'))[0]['content'] == '听到 ' + '大' * 6000 + '…'
    yield 'a message of 1.2 MB'
    gateway.frames.clear()
    await gateway.until(lambda: sum(f['cmd'] == 'ping' for f in gateway.frames) > 1)
    yield 'heartbeats'
    for code in () if tls else (1000, 1001, 1011):
        old = gateway.socket
        await old.close(code, '再见')
        assert old.close_code == code, old.close_code       # our echo carries the same
        await gateway.until(lambda old=old: gateway.socket is not old)
        await gateway.socket.send(gateway.message('C%d' % code, '回来了'))
        assert (await gateway.answer('C%d' % code))[0]['content'] == '听到 回来了'
        yield 'closed with %d, back' % code


async def goodbye(gateway):
    await asyncio.wait_for(gateway.socket.wait_closed(), 5)
    assert gateway.socket.close_code == 1000, gateway.socket.close_code
    return 'our close is 1000'


def certificate(folder):
    """A CA of its own and a certificate for localhost → (CA's PEM, the server's context)."""
    def path(name):
        return os.path.join(folder, name)
    ca = ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=ours',
          '-keyout', path('ca.key'), '-out', path('ca.pem')]
    request = ['openssl', 'req', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=localhost', '-keyout', path('key'),
               '-out', path('csr')]
    sign = ['openssl', 'x509', '-req', '-in', path('csr'), '-CA', path('ca.pem'), '-CAkey', path('ca.key'),
            '-CAcreateserial', '-days', '2', '-extfile', path('ext'), '-out', path('pem')]
    with open(path('ext'), 'w') as f:
        f.write('subjectAltName=DNS:localhost\n')
    for command in ca, request, sign:
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path('pem'), path('key'))
    return path('ca.pem'), context


@contextlib.asynccontextmanager
async def listening(context=None):
    gateway = Gateway()
    async with serve(gateway.handle, 'localhost', 0, ssl=context, max_size=8 << 20, ping_interval=None) as server:
        yield gateway, '%s://localhost:%d/' % ('wss' if context else 'ws', server.sockets[0].getsockname()[1])


async def run(passed, context=None, ca='', proxy=None, as_user='', **settings):
    async with listening(context) as (gateway, url), contextlib.AsyncExitStack() as stack:
        if proxy:
            listener = await stack.enter_async_context(await asyncio.start_server(proxy.handle, '127.0.0.1', 0))
            where = '%s127.0.0.1:%d' % (as_user, listener.sockets[0].getsockname()[1])
            os.environ['https_proxy'] = 'http://' + where
            stack.callback(os.environ.pop, 'https_proxy')
        with bot(url, ca_file=ca, **settings) as server:
            async for sentence in both_ways(gateway, server, bool(context)):
                passed.append(sentence)
            stopping = asyncio.to_thread(server.stop)
            passed.append(await asyncio.gather(goodbye(gateway), stopping) and 'our close is 1000')
        if proxy:
            assert len(proxy.asked) == 1 and 'CONNECT localhost:' in proxy.asked[0], proxy.asked


async def refused(passed, context, ca, proxy=None):
    """Does not connect, says why → the sentence."""
    async with listening(context) as (gateway, url), contextlib.AsyncExitStack() as stack:
        if proxy:
            listener = await stack.enter_async_context(await asyncio.start_server(proxy.handle, '127.0.0.1', 0))
            os.environ['https_proxy'] = 'http://u:wrong@127.0.0.1:%d' % listener.sockets[0].getsockname()[1]
            stack.callback(os.environ.pop, 'https_proxy')
        with bot(url, ca_file=ca) as server:
            for _ in range(100):
                if server.bot._session.failure:
                    break
                await asyncio.sleep(0.05)
            failure = str(server.bot._session.failure)
            assert not gateway.socket
            assert ('407' if proxy else 'ca_file') in failure and 'wrong' not in failure, failure
            passed.append(failure)


async def main():
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in list(os.environ):
            if name.lower() in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy'):
                del os.environ[name]
        ca, context = certificate(folder)
        await run(passed)
        await run(passed, context, ca)
        await run(passed, context, ca, Proxy())
        await run(passed, context, ca, Proxy(USER), '%s:%s@' % tuple(map(quoted, USER)))
        await refused(passed, context, '')
        await refused(passed, context, ca, Proxy(USER))
    print('interop websockets %s: %d passed (ws, wss, through a proxy, through one that wants a password)' % (
        websockets.__version__, len(passed)))


def quoted(text):
    return ''.join('%%%02X' % b for b in text.encode())


if __name__ == '__main__':
    logging.disable()
    asyncio.run(main())
