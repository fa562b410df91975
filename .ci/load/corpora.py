"""The requests of other servers' test suites against ours, straight and behind nginx: corpora.py.

They come from the packages at run time, none is stored: gunicorn, waitress, h11, cheroot and aiohttp (llhttp's tests
are in it) from PyPI, puma from Debian's sources, CPython from the running interpreter. Each is sent alone, and with a
signed message pipelined behind it. Straight there is one answer at most and the message behind never runs; behind
nginx both agree about every POST: each that we saw is in nginx's log with the same target and body, and a message ran
only where nginx took it for a request.
"""
import ast
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, os.pardir))

import easywechat  # noqa: E402

PYPI = 'gunicorn', 'waitress', 'h11', 'cheroot', 'aiohttp'
START = re.compile(rb'\s*[!-~]{1,40}[ \t]+\S[^\r\n]*HTTP/[0-9]')
NGINX = '''
daemon off; master_process off; pid %(folder)s/nginx.pid; error_log %(folder)s/nginx.err;
events { worker_connections 256; }
http {
    log_format seen escape=json '{"method": "$request_method", "target": "$request_uri", "body": "$request_body"}';
    access_log %(folder)s/seen.log seen;
    client_body_temp_path %(folder)s/a; proxy_temp_path %(folder)s/b; fastcgi_temp_path %(folder)s/c;
    uwsgi_temp_path %(folder)s/d; scgi_temp_path %(folder)s/e;
    client_body_buffer_size 2m; client_body_in_single_buffer on;
    client_header_timeout 1s; client_body_timeout 1s; keepalive_timeout 1s; lingering_close off;
    server { listen 127.0.0.1:%(port)d; location / { proxy_pass http://127.0.0.1:%(bot)d; proxy_next_upstream off; } }
}
'''


def unescape(data):
    """The escapes that these corpora use, as bytes."""
    names = {b'r': b'\r', b'n': b'\n', b't': b'\t', b'f': b'\f', b'0': b'\0', b'\\': b'\\', b'"': b'"'}
    return re.sub(rb'\\(x[0-9a-fA-F]{2}|.)', lambda m: bytes([int(m.group(1)[1:], 16)]) if len(m.group(1)) == 3
                  else names.get(m.group(1), m.group(1)), data)


def of_python(source):
    for node in ast.walk(ast.parse(source)):
        value = getattr(node, 'value', getattr(node, 's', None)) if node.__class__.__name__ in (
            'Constant', 'Str', 'Bytes') else None
        value = value.encode('utf-8', 'replace') if isinstance(value, str) else value
        if isinstance(value, bytes) and START.match(value):
            yield value.lstrip(b'\n')


def requests_of(path):
    """The requests in one file of a test suite (bytes); what is written with LF is sent with CRLF as well."""
    with open(path, 'rb') as f:
        data = f.read()
    if path.endswith('.http'):                                  # gunicorn: one line a line, \r\n written out
        found = [unescape(data.replace(b'\n', b''))]
    elif path.endswith('.md'):                                  # llhttp: a line end is CRLF
        found = [unescape(re.sub(rb'\r?\n', b'\r\n', re.sub(rb'\\\r?\n', b'', block)))
                 for block in re.findall(rb'```http\r?\n(.*?)```', data, re.S)]
    elif path.endswith('.rb'):
        found = [unescape(text) for text in re.findall(rb'"((?:[^"\\]|\\.)*HTTP/(?:[^"\\]|\\.)*)"', data, re.S)]
    else:
        found = list(of_python(data))
    for request in found:
        if START.match(request):
            yield request
            if re.search(rb'(?<!\r)\n', request):
                yield re.sub(rb'\r?\n', b'\r\n', request)


def fetch_suites(folder):
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', folder]
                   + list(PYPI), check=True)
    if shutil.which('apt-get'):         # sources of the main archive only, beside the system's own lists
        sources = os.path.join(folder, 'sources')
        os.makedirs(os.path.join(folder, 'lists', 'partial'))
        os.mkdir(sources)
        with open('/etc/os-release') as f:
            suite = re.search('VERSION_CODENAME=(\\w+)', f.read()).group(1)
        with open(os.path.join(sources, 'main.list'), 'w') as f:
            f.write('deb-src http://deb.debian.org/debian %s main\n' % suite)
        apt = ['apt-get', '-q', '-o', 'APT::Sandbox::User=root', '-o', 'Dir::Etc::sourcelist=/dev/null', '-o',
               'Dir::Etc::sourceparts=' + sources, '-o', 'Dir::State::lists=' + os.path.join(folder, 'lists'), '-o',
               'Dir::Cache::pkgcache=', '-o', 'Dir::Cache::srcpkgcache=']
        for command in ['update'], ['source', '--download-only', 'puma']:
            subprocess.run(apt + command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    for path in glob.glob(os.path.join(folder, '*.tar.gz')):
        with tarfile.open(path) as archive:
            archive.extractall(folder)


def suites(folder):
    """→ {suite: its requests, each once}."""
    patterns = {'gunicorn': ['gunicorn-*/tests/**/*.http', 'gunicorn-*/tests/**/*.py'],
                'waitress': ['waitress-*/tests/*.py'],
                'h11': ['h11-*/h11/tests/*.py'], 'cheroot': ['cheroot-*/cheroot/test/*.py'],
                'llhttp': ['aiohttp-*/vendor/llhttp/test/request/*.md'], 'aiohttp': ['aiohttp-*/tests/*.py'],
                'puma': ['puma-*/test/*.rb'],
                'CPython': [os.path.join(os.path.dirname(os.__file__), 'test', 'test_http*.py')]}
    for name, wanted in patterns.items():
        paths = [path for pattern in wanted for path in glob.glob(os.path.join(folder, pattern), recursive=True)]
        yield name, list(dict.fromkeys(request for path in sorted(paths) for request in requests_of(path)))


class Recording(easywechat.WeChatServer):
    head_within, request_within = 0.3, 0.6

    def respond(self, method, target, body, client, send, spawn=None):
        self.seen.append((method, target, body))
        super().respond(method, target, body, client, send, spawn)


def signed_message(crypt, n):
    xml = easywechat.dict_to_xml({'ToUserName': easywechat._DEMO['corpid'], 'FromUserName': 'u', 'MsgType': 'text',
                                  'CreateTime': int(time.time()), 'Content': 'x', 'MsgId': n})
    query, encrypt = easywechat._signed(crypt, xml)
    body = b'<xml><Encrypt>%s</Encrypt></xml>' % encrypt.encode()
    target = '/weixin?' + urllib.parse.urlencode(query)
    return target, b'POST %s HTTP/1.1\r\nHost: nas\r\nContent-Length: %d\r\n\r\n' % (target.encode(), len(body)) + body


def exchange(port, data, wait):
    """→ all that came back."""
    answer = b''
    with socket.create_connection(('127.0.0.1', port), 5) as sock:
        try:
            sock.sendall(data)
            sock.settimeout(wait)
            for piece in iter(lambda: sock.recv(65536), b''):
                answer += piece
        except OSError:
            pass
    return answer


def answers_in(data):
    """How many answers these bytes are; anything else left over counts as one more."""
    count = 0
    while data:
        head, _, rest = data.partition(b'\r\n\r\n')
        if head.startswith(b'HTTP/1.1 100 '):
            data = rest
            continue
        count += 1
        length = re.search(rb'(?i)\r\ncontent-length: *([0-9]+)', head)
        data = rest[int(length.group(1)):] if length and head.startswith(b'HTTP/1.1 ') else b''
    return count


def straight(server, port, request, follow, runs, n):
    data = exchange(port, request + follow, 1)
    bad = []
    if answers_in(data) > 1 or len(server.seen) > 1:
        bad.append('double answer')
    if follow and str(n) in runs:
        bad.append('the message behind it ran')
    return bad


def behind(server, port, request, follow, runs, n, log):
    data = exchange(port, request + follow, 0.3)
    for _ in range(40):                 # a line is written when its request has ended
        seen = [json.loads(line) for line in log.read().decode('latin-1').splitlines()]
        behind.known += seen
        if len(behind.known) >= len(server.seen) and answers_in(data) <= len(behind.known):
            break
        time.sleep(0.05)
    known, behind.known, bad = behind.known, [], []
    if answers_in(data) > max(1, len(known)):
        bad.append('double answer')
    for method, target, body in server.seen:
        ours = method, target, body.decode('latin-1')
        if method == 'POST' and not any((k['method'], k['target'], k['body']) == ours for k in known):
            bad.append('a POST that nginx does not know: %s %r' % (target, body[:60]))
    posts = sum(k['method'] == 'POST' and k['target'].startswith('/weixin?msg_signature') for k in known)
    if follow and (str(n) in runs) > posts:
        bad.append('a message that nginx did not forward ran')
    return bad


behind.known = []


def main():
    crypt = easywechat.WXBizMsgCrypt(*(easywechat._DEMO[k] for k in ('token', 'encoding_aes_key', 'corpid')))
    server, runs, total, failed, n = Recording('demo', **easywechat._DEMO), [], 0, 0, 0
    easywechat.logger.setLevel('ERROR')
    server.register_callback('*', lambda msg: runs.append(msg['MsgId']))
    server.seen = []
    with tempfile.TemporaryDirectory() as folder:
        fetch_suites(folder)
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            port = sock.getsockname()[1]
        bot = server.start('127.0.0.1', 0)[1]
        with open(os.path.join(folder, 'nginx.conf'), 'w') as f:
            f.write(NGINX % {'folder': folder, 'port': port, 'bot': bot})
        nginx = subprocess.Popen([shutil.which('nginx'), '-c', f.name, '-p', folder])
        log = None
        while not log:
            time.sleep(0.05)
            if os.path.exists(os.path.join(folder, 'seen.log')):
                log = open(os.path.join(folder, 'seen.log'), 'rb')
        try:
            for name, found in suites(folder):
                count = 0
                for request in found:
                    for pipelined in False, True:
                        for way, door in (straight, bot), (behind, port):
                            n, count = n + 1, count + 1
                            follow = signed_message(crypt, n)[1] if pipelined else b''
                            del server.seen[:]
                            bad = way(server, door, request, follow, runs, n, *[log] * (way is behind))
                            failed += bool(bad)
                            for what in bad:
                                print('%s, %s: %s: %r' % (name, way.__name__, what, request[:200]))
                total += count
                print('%-9s %4d requests, sent %d times' % (name, len(found), count), flush=True)
                failed += not found
        finally:
            log.close()
            nginx.terminate()
            nginx.wait()
            server.stop()
    print('corpora: %d exchanges, %d messages ran, %d failed' % (total, len(runs), failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
