"""Uploads read back by other people's multipart parsers, werkzeug's and python-multipart's, on a real socket."""
import os
import sys
import tempfile
import threading

import python_multipart
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

import easywechat  # noqa: E402

NAMES = ['照片.jpg', 'a"b".png', "it's.txt", 'a;b=c,d.txt', 'cr\r\nlf.txt', '文' * 65 + '.amr', 'x' * 197 + '.mp4',
         'tab\there', 'a\\b', ' 空 格 .pdf', '😀.bin', 'filename="x"', "UTF-8''%41"]
GOT = []


def expected(name, parser):
    """As a browser sends it (WHATWG), whose %22 werkzeug decodes; a backslash and other control characters become _."""
    name = name.replace('"', '"' if parser == 'werkzeug' else '%22').replace('\r', '%0D').replace('\n', '%0A')
    return name.replace('\t', '_').replace('\\', '_')


def read_twice(request):
    body = request.get_data(cache=True)
    media = request.files['media']
    GOT.append((media.filename, media.read()))
    boundary = request.mimetype_params['boundary'].encode()
    names, data = [], []
    parser = python_multipart.MultipartParser(boundary, {
        'on_header_value': lambda b, start, end: names.append(b[start:end]),
        'on_part_data': lambda b, start, end: data.append(b[start:end])})
    parser.write(body)
    parser.finalize()
    _, options = python_multipart.multipart.parse_options_header(names[0])
    GOT.append((options[b'filename'].decode('utf-8'), b''.join(data)))


@Request.application
def app(request):
    if request.path.endswith('gettoken'):
        return Response('{"errcode": 0, "access_token": "t", "expires_in": 7200}')
    read_twice(request)
    return Response('{"errcode": 0, "media_id": "M"}', content_type='application/json')


def main():
    class Quiet(WSGIRequestHandler):
        def log(self, *args):
            pass
    server = make_server('127.0.0.1', 0, app, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = easywechat.WeChatClient('x', corpid='c', secret='s', store=easywechat.MemoryStore(),
                                     api_base='http://127.0.0.1:%d' % server.server_port)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            data = os.urandom(100000)
            path = os.path.join(folder, 'file')
            with open(path, 'wb') as f:
                f.write(data)
            client.upload(path, 'file', name)
            for parser, got in zip(('werkzeug', 'python-multipart'), GOT[-2:]):
                if got != (expected(name, parser), data):
                    failed += 1
                    print('%s reads %r as %r' % (parser, name, got[0]))
    print('uploads: %d passed, %d failed' % (2 * len(NAMES) - failed, failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
