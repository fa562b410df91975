"""What the original does with a message, on Python 3: Flask, xmltodict, dicttoxml, pycryptodome, and requests imported.

Written for this comparison, step by step as the original: ElementTree for the envelope, a deep copy for the callback,
a straight-line WXBizMsgCrypt, a template for the answer, a line of its log to a file and to stderr, and Flask's own.
"""
import base64
import copy
import hashlib
import logging
import os
import random
import socket
import string
import struct
import sys
import tempfile
import xml.etree.ElementTree as ET

import dicttoxml
import requests  # noqa: F401
import xmltodict
from Crypto.Cipher import AES
from flask import Flask, Response, abort, request

TOKEN, KEY, CORPID = (os.environ['EASYWECHAT_' + k] for k in ('TOKEN', 'ENCODING_AES_KEY', 'CORPID'))
KEY = base64.b64decode(KEY + '=')
ENVELOPE = ('<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature>'
            '<TimeStamp>%s</TimeStamp><Nonce><![CDATA[%s]]></Nonce></xml>')
app, log = Flask(__name__), logging.getLogger('original')


def sign(*parts):
    return hashlib.sha1(''.join(sorted((TOKEN,) + parts)).encode()).hexdigest()


def decrypt(encrypt):
    data = AES.new(KEY, AES.MODE_CBC, KEY[:16]).decrypt(base64.b64decode(encrypt))
    data = data[16:-data[-1]]
    length = socket.ntohl(struct.unpack('I', data[:4])[0])
    return data[4:4 + length].decode() if data[4 + length:].decode() == CORPID else abort(400)


def encrypt(text):
    data, prefix = text.encode(), ''.join(random.sample(string.ascii_letters + string.digits, 16)).encode()
    data = prefix + struct.pack('I', socket.htonl(len(data))) + data + CORPID.encode()
    count = 32 - len(data) % 32
    return base64.b64encode(AES.new(KEY, AES.MODE_CBC, KEY[:16]).encrypt(data + bytes([count]) * count)).decode()


def to_xml(data):
    """Numbers as they are, the rest in CDATA; dicttoxml escapes that, so it is put back."""
    for key, value in data.items():
        try:
            data[key] = int(value)
        except ValueError:
            data[key] = '<![CDATA[%s]]>' % value
    inner = dicttoxml.dicttoxml(data, root=False, attr_type=False, ids=False).decode()
    return ('<xml>%s</xml>' % inner).replace('&lt;', '<').replace('&gt;', '>')


@app.route('/weixin', methods=['GET', 'POST'])
def weixin():
    args = request.args
    if request.method == 'GET':
        return decrypt(args['echostr'])
    given = ET.fromstring(request.data).find('Encrypt').text
    if sign(args['timestamp'], args['nonce'], given) != args['msg_signature']:
        abort(400)
    msg = xmltodict.parse(decrypt(given))['xml']
    reply = copy.deepcopy(msg)
    reply['ToUserName'], reply['FromUserName'] = msg['FromUserName'], msg['ToUserName']
    sealed = encrypt(to_xml(reply))
    log.info('replied a message to %s', msg['FromUserName'])
    return Response(ENVELOPE % (sealed, sign(args['timestamp'], args['nonce'], sealed), args['timestamp'],
                                args['nonce']), mimetype='text/xml')


if __name__ == '__main__':
    log.setLevel(logging.INFO)
    for handler in logging.FileHandler(os.path.join(tempfile.gettempdir(), 'original.log')), logging.StreamHandler():
        handler.setFormatter(logging.Formatter('%(asctime)s - %(name)s - %(levelname)s - %(message)s'))
        log.addHandler(handler)
    app.run('127.0.0.1', int(sys.argv[1]), threaded=True)
