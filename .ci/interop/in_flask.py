"""README's mounting in a real Flask: it answers a message, and a POST of 200 MB is refused before it is read."""
import os
import re
import socket
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, os.pardir))

import easywechat  # noqa: E402

SIZE = 200 << 20


def serve():
    import flask
    from werkzeug.serving import make_server
    app = flask.Flask('bot')
    app.add_url_rule('/', view_func=lambda: 'the rest of the program')
    server = easywechat.WeChatServer('demo', **easywechat._DEMO)
    server.register_callback('text', lambda msg: msg)
    with open(os.path.join(HERE, os.pardir, os.pardir, 'README.md'), encoding='utf-8') as f:
        block = re.search('```py\n(from werkzeug.*?)```', f.read(), re.S).group(1)
    exec(block, {'app': app, 'server': server})
    web = make_server('127.0.0.1', 0, app, threaded=True)
    print(web.server_port, flush=True)
    web.serve_forever()


def peak(pid):
    with open('/proc/%d/status' % pid) as f:
        return int(re.search(r'VmHWM:\s+(\d+)', f.read()).group(1)) / 1024


def post(port, size):
    """→ (status, how much was sent before the answer)."""
    sent, data = 0, b''
    with socket.create_connection(('127.0.0.1', port), 10) as sock:
        sock.sendall(b'POST /weixin?a=b HTTP/1.1\r\nHost: nas\r\nContent-Length: %d\r\n\r\n' % size)
        try:
            while sent < size:
                sent += sock.send(bytes(min(1 << 20, size - sent)))
        except OSError:
            pass
        try:
            data = sock.recv(65536)
        except OSError:
            pass
    return int(data.split()[1]) if data else 0, sent


def main():
    process = subprocess.Popen([sys.executable, __file__, 'serve'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        port = int(process.stdout.readline())
        url = 'http://127.0.0.1:%d/weixin' % port
        for path, want in ('/weixin', 200), ('/', 200), ('/weixin/x', 404):
            with easywechat.fetch('http://127.0.0.1:%d%s' % (port, path), proxies={}) as answer:
                assert answer.status == want, (path, answer.status)
        assert easywechat._probe(url, easywechat._DEMO, '你好')[1]['Content'] == '你好'
        before = peak(process.pid)
        status, sent = post(port, SIZE)
        grown = peak(process.pid) - before
        assert easywechat._probe(url, easywechat._DEMO, '还在')[1]['Content'] == '还在'
    finally:
        process.terminate()
        process.wait()
    print('Flask: a POST of %d MB got %s after %.1f MB, peak memory grew by %.1f MB' % (
        SIZE >> 20, status or 'hung up', sent / (1 << 20), grown))
    return 0 if status in (0, 413) and grown < 100 else 1


if __name__ == '__main__':
    sys.exit(serve() if sys.argv[1:] == ['serve'] else main())
