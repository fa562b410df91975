"""http.server as it comes, ThreadingHTTPServer, with our codec."""
import http.server
import os
import socketserver
import sys
import time
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

from easywechat import WXBizMsgCrypt, dict_to_xml, xml_to_dict  # noqa: E402

CRYPT = WXBizMsgCrypt(*(os.environ['EASYWECHAT_' + k] for k in ('TOKEN', 'ENCODING_AES_KEY', 'CORPID')))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_POST(self):
        query = dict(urllib.parse.parse_qsl(self.path.partition('?')[2]))
        body = self.rfile.read(int(self.headers['Content-Length']))
        msg = xml_to_dict(CRYPT.decrypt_message(body, query['msg_signature'], query['timestamp'], query['nonce']))
        reply = {'ToUserName': msg['FromUserName'], 'FromUserName': msg['ToUserName'],
                 'CreateTime': int(time.time()), 'MsgType': 'text', 'Content': msg['Content']}
        data = CRYPT.encrypt_message(dict_to_xml(reply), query['nonce']).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'text/xml')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


Server(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
