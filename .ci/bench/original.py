"""The original's stack on Python 3: Flask, xmltodict, dicttoxml and pycryptodome, with its straight-line WXBizMsgCrypt.

Written for this comparison from the protocol; as much work a message as the original does, not more.
"""
import base64
import hashlib
import os
import socket
import struct
import sys
import time

import dicttoxml
import xmltodict
from Crypto.Cipher import AES
from flask import Flask, request

TOKEN, KEY, CORPID = (os.environ['EASYWECHAT_' + k] for k in ('TOKEN', 'ENCODING_AES_KEY', 'CORPID'))
KEY = base64.b64decode(KEY + '=')
app = Flask(__name__)


def sign(*parts):
    return hashlib.sha1(''.join(sorted((TOKEN,) + parts)).encode()).hexdigest()


def decrypt(encrypt):
    data = AES.new(KEY, AES.MODE_CBC, KEY[:16]).decrypt(base64.b64decode(encrypt))
    data = data[16:-data[-1]]
    length = socket.ntohl(struct.unpack('I', data[:4])[0])
    return data[4:4 + length].decode()


def encrypt(text):
    data = os.urandom(16) + struct.pack('I', socket.htonl(len(text.encode()))) + text.encode() + CORPID.encode()
    count = 32 - len(data) % 32
    return base64.b64encode(AES.new(KEY, AES.MODE_CBC, KEY[:16]).encrypt(data + bytes([count]) * count)).decode()


def to_xml(data):
    return dicttoxml.dicttoxml(data, custom_root='xml', attr_type=False, cdata=True).decode()


@app.route('/weixin', methods=['GET', 'POST'])
def weixin():
    args = request.args
    if request.method == 'GET':
        return decrypt(args['echostr'])
    envelope = xmltodict.parse(request.data)['xml']
    if sign(args['timestamp'], args['nonce'], envelope['Encrypt']) != args['msg_signature']:
        return '', 403
    msg = dict(xmltodict.parse(decrypt(envelope['Encrypt']))['xml'])
    msg['ToUserName'], msg['FromUserName'] = msg['FromUserName'], msg['ToUserName']
    now, reply = str(int(time.time())), encrypt(to_xml(msg))
    return to_xml({'Encrypt': reply, 'MsgSignature': sign(now, args['nonce'], reply), 'TimeStamp': now,
                   'Nonce': args['nonce']})


if __name__ == '__main__':
    import logging
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    app.run('127.0.0.1', int(sys.argv[1]), threaded=True)
