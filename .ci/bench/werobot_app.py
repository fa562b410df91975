"""WeRoBot on its own server (bottle on wsgiref, threads). Its requests carry 公众号's signature beside ours."""
import os
import socketserver
import sys
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from werobot import WeRoBot

robot = WeRoBot(token=os.environ['EASYWECHAT_TOKEN'])
robot.config.update(SESSION_STORAGE=False, ENCODING_AES_KEY=os.environ["EASYWECHAT_ENCODING_AES_KEY"],
                    APP_ID=os.environ['EASYWECHAT_CORPID'])


@robot.text
def echo(message):
    return message.content


class Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128


class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass


make_server('127.0.0.1', int(sys.argv[1]), robot.wsgi, Server, Quiet).serve_forever()
