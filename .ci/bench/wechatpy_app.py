"""wechatpy's echo: `python wechatpy_app.py PORT` on Flask's server, or `wechatpy_app:app` behind another."""
import os
import sys

from flask import Flask, request
from wechatpy.work import create_reply, parse_message
from wechatpy.work.crypto import WeChatCrypto

TOKEN, KEY, CORPID = (os.environ['EASYWECHAT_' + k] for k in ('TOKEN', 'ENCODING_AES_KEY', 'CORPID'))
app = Flask(__name__)


@app.route('/weixin', methods=['GET', 'POST'])
def weixin():
    crypto = WeChatCrypto(TOKEN, KEY, CORPID)
    args = request.args
    if request.method == 'GET':
        return crypto.check_signature(args['msg_signature'], args['timestamp'], args['nonce'], args['echostr'])
    msg = parse_message(crypto.decrypt_message(request.data, args['msg_signature'], args['timestamp'], args['nonce']))
    reply = create_reply(msg.content, msg).render()
    return crypto.encrypt_message(reply, args['nonce'], args['timestamp'])


if __name__ == '__main__':
    import logging
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    app.run('127.0.0.1', int(sys.argv[1]), threaded=True)
