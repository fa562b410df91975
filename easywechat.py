#!/usr/bin/env python3
"""EasyWeChat:一个 Python 文件,把机器人接到企业微信 (WeCom)。

(与同名的 PHP SDK 无关。)把这个文件复制到自己的项目里,写一个函数,就有了会回话的机器人::

    import easywechat

    def reply_func(param_dict):             # 企业微信发来的消息,一个普通的 dict
        return param_dict                   # 原样返回;也可以返回 '一句话'

    server = easywechat.WeChatServer('demo')        # 读 config.ini 的 [demo]
    server.register_callback('text', reply_func)
    server.run(host='0.0.0.0', port=8000)

只用标准库;收消息另需 pycryptodome 里的 AES。没有账号也能先看一眼:``python easywechat.py --echo``。

从上往下读,每一节只用上面讲过的东西::

    错误 → XML → 加解密 → 配置 → 存储 → 消息 → 回调模式 Dispatcher → 服务器 → 命令行

    企业微信 ──HTTP──▶ http.server 外壳 ┐                    ┌▶ 你的函数(dict) ─▶ str | dict | None
    gunicorn ──WSGI──▶ server(environ,…)┼▶ Dispatcher.handle ┤
    Flask 视图、测试 ───────────────────┘  验签 → 解密 → XML      XML → 加密 → 签名

MIT License, EasyWeChat contributors.
"""

import binascii
import collections
import configparser
import contextlib
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import importlib
import json
import os
import re
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET

try:
    import logging
    logger = logging.getLogger('easywechat')
except ImportError:             # OpenWrt 没装 python3-logging:警告以上写到 stderr
    class logger:               # 与 logging.Logger 同名的几个方法,只此而已
        debug = info = staticmethod(lambda msg, *args: None)
        warning = error = staticmethod(lambda msg, *args: print(
            'easywechat: ' + (msg % args if args else msg), file=sys.stderr))
    logging = None

__version__ = '0.1.0'

__all__ = ['WeChatServer', 'Dispatcher', 'WXBizMsgCrypt', 'MemoryStore', 'xml_to_dict',
           'dict_to_xml', 'get_config', 'ierror', 'WeChatError', 'CryptoError',
           'FormatException', 'ConfigError']


# ---- 错误 Errors ------------------------------------------------------------------------------
# 会出什么错,全在这里。里面的代码一律抛异常;异常知道 HTTP 该答什么,外壳照抄。
# 对外,验签以后的失败看上去都一样 (403,没有正文);是哪一种、该改哪里,只写在日志里。

class ierror:
    """官方 WXBizMsgCrypt 的返回码(开发者文档 path/90968「加解密方案说明」)。"""

    WXBizMsgCrypt_OK = 0
    WXBizMsgCrypt_ValidateSignature_Error = -40001
    WXBizMsgCrypt_ParseXml_Error = -40002
    WXBizMsgCrypt_ComputeSignature_Error = -40003
    WXBizMsgCrypt_IllegalAesKey = -40004
    WXBizMsgCrypt_ValidateCorpid_Error = -40005
    WXBizMsgCrypt_EncryptAES_Error = -40006
    WXBizMsgCrypt_DecryptAES_Error = -40007
    WXBizMsgCrypt_IllegalBuffer = -40008
    WXBizMsgCrypt_EncodeBase64_Error = -40009
    WXBizMsgCrypt_DecodeBase64_Error = -40010
    WXBizMsgCrypt_GenReturnXml_Error = -40011


#: errcode → (HTTP 状态, 一句话:违反了哪条规则,该改哪里)。正数就是 HTTP 状态本身。
_ERRORS = {
    ierror.WXBizMsgCrypt_ValidateSignature_Error:
        (403, 'signature differs: Token must be the same here and in the console'),
    ierror.WXBizMsgCrypt_ParseXml_Error:
        (400, 'no envelope: neither <xml> with one <Encrypt> nor {"encrypt": "..."}'),
    ierror.WXBizMsgCrypt_ComputeSignature_Error:
        (500, 'cannot sign: nonce takes 1 to 63 printable ASCII characters, timestamp 10 digits'),
    ierror.WXBizMsgCrypt_IllegalAesKey:
        (500, 'EncodingAESKey must be 43 characters of A-Z a-z 0-9'),
    ierror.WXBizMsgCrypt_ValidateCorpid_Error:
        (403, 'receive id differs: is corpid here the one of the sender?'),
    ierror.WXBizMsgCrypt_EncryptAES_Error:
        (500, 'cannot encrypt: not a text'),
    ierror.WXBizMsgCrypt_DecryptAES_Error:
        (403, 'bad padding: EncodingAESKey must be the same here and in the console'),
    ierror.WXBizMsgCrypt_IllegalBuffer:
        (403, 'decrypted, but no message: its length field is wrong'),
    ierror.WXBizMsgCrypt_EncodeBase64_Error:
        (500, 'cannot encode base64'),
    ierror.WXBizMsgCrypt_DecodeBase64_Error:
        (403, 'not base64: a proxy cut the query or the body, or turned + into something else'),
    ierror.WXBizMsgCrypt_GenReturnXml_Error:
        (500, 'cannot write XML'),
    400: (400, 'not HTTP as RFC 9112 writes it'),
    404: (404, 'wrong path'),
    405: (405, 'only GET, HEAD and POST are served'),
    411: (411, 'POST needs a Content-Length'),
    413: (413, 'body too large'),
    414: (414, 'request line too long'),
    431: (431, 'too many or too long header fields'),
    500: (500, 'internal error'),
    503: (503, 'no answer in time'),
}


class WeChatError(Exception):
    """本模块所有错误的祖先。

    ``errcode`` (int) 是官方返回码或 HTTP 状态,``errmsg`` (str) 是一句英文;``status`` 是 HTTP 状态。
    """

    def __init__(self, errcode, errmsg=None):
        super().__init__(errcode, errmsg or _ERRORS[errcode][1])
        self.errcode, self.errmsg = self.args

    def __str__(self):
        return '%s (%d)' % (self.errmsg, self.errcode)

    @property
    def status(self):
        """回给对方的 HTTP 状态。"""
        return _ERRORS.get(self.errcode, _ERRORS[500])[0]


class CryptoError(WeChatError):
    """验签、加密或解密失败;``errcode`` 是 `ierror` 里的一个。"""


class FormatException(WeChatError):
    """读不懂的 XML / JSON(-40002),或写不成 XML 的内容(-40011)。"""


class ConfigError(WeChatError):
    """配置缺了什么或写错了;``errcode`` 是命令行的退出码 2。"""

    def __init__(self, errmsg):
        super().__init__(2, errmsg)


_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]')


def _show(value, limit=200):
    """外来的文字进日志以前:截短,控制字符写成转义,伪造不了日志行,也动不了终端。"""
    text = str(value)
    if limit and len(text) > limit:
        text = text[:limit] + '...'
    return _UNPRINTABLE.sub(lambda m: '\\u%04x' % ord(m.group()), text)


def _traceback():
    """当前异常的 traceback,每行缩进、转义:里面可能有用户发来的字。"""
    import traceback
    return ''.join('\n    ' + _show(line, None) for line in traceback.format_exc().splitlines())


def _mask(text):
    """认得出、但不完整的标识,例如 'ww58...c7'。"""
    return text[:4] + '...' + text[-2:] if len(text) > 8 else '...'


# ---- XML --------------------------------------------------------------------------------------
# 企业微信的消息:<xml><MsgType><![CDATA[text]]></MsgType><Content>…</Content>…</xml>(path/90239)。
# 读:根去掉;没有子元素的是 str(从不转换,007 还是 007),有的是 dict,同名的兄弟是 list。
# 写:反过来。文字进 CDATA,list 写成同名的兄弟。XML 1.0 不许的字符,两个方向都去掉。

#: 一个文档最多多少字符、多少层、多少个元素。
_XML_SIZE, _XML_DEPTH, _XML_ELEMENTS = 1 << 20, 16, 2000

_NOT_XML = re.compile('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')
# DTD 只可能出现在根元素以前,所以只要以根元素开头(至多先有一个声明),就没有实体可展开。
_BEGINS_WITH_ROOT = re.compile(r'(?:<\?xml\s[^<>]*\?>\s*)?<[^!?]')
_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]{0,127}')


class _DictBuilder:
    """`ET.XMLParser` 的 target:一边解析一边生成 dict,超过限制就停。"""

    def __init__(self):
        self._open = []         # 外层到内层:还没有子元素的是 None,有的是它的 dict
        self._text = []
        self._count = 0
        self._root = None

    def start(self, tag, attributes):
        self._count += 1
        if self._count > _XML_ELEMENTS or len(self._open) >= _XML_DEPTH:
            raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error, 'XML has more than %d '
                                  'elements or %d levels' % (_XML_ELEMENTS, _XML_DEPTH))
        self._open.append(None)
        self._text = []

    def data(self, text):
        self._text.append(text)

    def end(self, tag):
        value = self._open.pop()
        if value is None:
            value = ''.join(self._text)
        self._text = []                     # 子元素之间的空白只是排版
        if not self._open:
            self._root = value
            return
        siblings = self._open[-1]
        if siblings is None:
            siblings = self._open[-1] = {}
        if tag not in siblings:
            siblings[tag] = value
        elif isinstance(siblings[tag], list):
            siblings[tag].append(value)
        else:
            siblings[tag] = [siblings[tag], value]

    def close(self):
        return self._root if isinstance(self._root, dict) else {}


def xml_to_dict(text):
    """把一个 XML 文档(str,或 UTF-8 的 bytes)读成 dict。

    >>> xml_to_dict('<xml><Content><![CDATA[007]]></Content><Item>a</Item><Item>b</Item></xml>')
    {'Content': '007', 'Item': ['a', 'b']}

    最多 1 MiB、16 层、2000 个元素,不许有 DTD;读不懂的抛 `FormatException` (-40002)。
    """
    try:
        if isinstance(text, bytes):
            text = text.decode('utf-8')
        if len(text) > _XML_SIZE:
            raise ValueError('longer than %d' % _XML_SIZE)
        text = _NOT_XML.sub('', text).lstrip('\ufeff \t\r\n')
        if not _BEGINS_WITH_ROOT.match(text):
            raise ValueError('does not begin with its root element')
        parser = ET.XMLParser(target=_DictBuilder(), encoding='utf-8')
        parser.feed(text.encode('utf-8'))
        return parser.close()
    except (ET.ParseError, ValueError, LookupError, RecursionError, MemoryError) as e:
        raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error,
                              'cannot read XML: %s' % _show(e)) from None


def _write_element(name, value, depth):
    if isinstance(value, (list, tuple)) and depth <= _XML_DEPTH:
        return ''.join([_write_element(name, item, depth + 1) for item in value])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error,
                              'not a name for an XML element: %s' % _show(repr(name)))
    if isinstance(value, str):
        text = _NOT_XML.sub('', value).replace(']]>', ']]]]><![CDATA[>')
        return '<%s><![CDATA[%s]]></%s>' % (name, text, name)
    if isinstance(value, bool):
        return '<%s>%s</%s>' % (name, 'true' if value else 'false', name)
    if isinstance(value, int):
        return '<%s>%d</%s>' % (name, value, name)
    if isinstance(value, dict) and depth <= _XML_DEPTH:
        inner = ''.join([_write_element(k, v, depth + 1) for k, v in value.items()])
        return '<%s>%s</%s>' % (name, inner, name)
    raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error,
                          '%s must be str, int, bool, dict or list, at most %d levels deep, got %s'
                          % (name, _XML_DEPTH, type(value).__name__))


def dict_to_xml(data):
    """`xml_to_dict` 的反函数:dict → 以 ``<xml>`` 为根的文档 (str)。

    >>> dict_to_xml({'Content': '<b>', 'CreateTime': 1700000000})
    '<xml><Content><![CDATA[<b>]]></Content><CreateTime>1700000000</CreateTime></xml>'

    值可以是 str、int、bool、dict、list;别的,或不能做元素名的键,抛 `FormatException` (-40011)。
    """
    if not isinstance(data, dict):
        raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error,
                              'expected a dict, got %s' % type(data).__name__)
    return _write_element('xml', data, 1)


# ---- 加解密 Crypto ----------------------------------------------------------------------------
# 官方文档 path/90968。密文 = base64(AES-256-CBC(pad32(random(16) + 长度(4,大端) + msg + receiveid))),
# 密钥 = base64decode(EncodingAESKey + '='),IV = 密钥的前 16 字节,PKCS#7 以 32 字节为块。
# 签名 = sha1(排序后拼接的 token、timestamp、nonce、密文)。它不绑定各段的边界,所以每段的格式都要严。
# 信封 = <xml>…<Encrypt>密文</Encrypt>…</xml> 或 {"encrypt": "密文"};未验签的字节不进任何 XML 解析器。

_AES_INSTALL = """AES is missing. Install it with the line for this system:
    pip:            python3 -m pip install pycryptodome
    Debian, Ubuntu: apt install python3-pycryptodome
    Alpine:         apk add py3-pycryptodome
    OpenWrt:        opkg install python3-cryptodome     (25.12 and later: apk add python3-cryptodome)
    Entware:        opkg install python3-cryptodome"""

_SIGNATURE = re.compile('[0-9a-f]{40}')
_TIMESTAMP = re.compile('[1-9][0-9]{9}')
_NONCE = re.compile('[!-~]{1,63}')
_BASE64 = re.compile(b'[A-Za-z0-9+/]+={0,2}')


@functools.lru_cache(maxsize=None)
def _aes():
    """AES 模块:pip 的包叫 Crypto,Debian 的叫 Cryptodome;古老的 PyCrypto 也叫 Crypto,不要它。"""
    for package in 'Crypto', 'Cryptodome':
        try:
            if importlib.import_module(package).version_info >= (3, 4):
                return importlib.import_module(package + '.Cipher.AES')
        except (ImportError, AttributeError):
            continue
    raise ImportError(_AES_INSTALL)


def _pad(data):
    count = 32 - len(data) % 32
    return data + bytes([count]) * count


def _unpad(data):
    count = data[-1]
    if not 1 <= count <= 32 or data[-count:] != bytes([count]) * count:
        raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error)
    return data[:-count]


def _json_encrypt(body):
    """``{"encrypt": "…"}`` → 密文。括号和逗号先数过,数字不转换:多大的垃圾都花不了多少时间。"""
    if body.count(b'{') + body.count(b'[') + body.count(b',') > 64:
        raise ValueError('too many parts')
    data = json.loads(body.decode('utf-8'), parse_int=len, parse_float=len, parse_constant=len)
    return (data.get('encrypt') or data.get('Encrypt')).encode('ascii')


def _cut_encrypt(body):
    """从信封 (bytes) 里切出密文 (bytes):恰好一对 ``<Encrypt>``,有没有 CDATA 都行;或 JSON。"""
    begin, end = body.find(b'<Encrypt>'), body.find(b'</Encrypt>')
    try:
        if body.lstrip()[:1] == b'{':
            return _json_encrypt(body)
        if not 0 <= begin < end or body.count(b'Encrypt>') != 2:
            raise ValueError('not exactly one Encrypt')
        value = body[begin + 9:end].strip()
        return value[9:-3] if value[:9] == b'<![CDATA[' and value[-3:] == b']]>' else value
    except (ValueError, AttributeError, RecursionError):
        raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error) from None


def _official(method):
    """官方方法的约定:返回 ``(返回码, 值)``,不抛异常。"""
    @functools.wraps(method)
    def code_and_value(*args, **kwargs):
        try:
            return ierror.WXBizMsgCrypt_OK, method(*args, **kwargs)
        except WeChatError as e:
            return e.errcode, None
    return code_and_value


class WXBizMsgCrypt:
    """一个应用的验签和加解密,与官方示例同名同参。

    ``sToken`` 和 ``sEncodingAESKey``(恰好 43 个字符)在「应用管理 → 应用 → 接收消息 → 设置API接收」;
    ``sCorpId`` 是企业ID,第三方套件用 SuiteID,智能机器人用空字符串。
    密钥不对抛 `CryptoError` (-40004),没有 AES 抛 `ImportError`,其中写着怎么装。
    """

    def __init__(self, sToken, sEncodingAESKey, sCorpId):
        if not re.fullmatch('[A-Za-z0-9+/]{43}', sEncodingAESKey):
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalAesKey, 'EncodingAESKey must be 43 '
                              'characters of A-Z a-z 0-9, got %d' % len(sEncodingAESKey))
        self._key = binascii.a2b_base64(sEncodingAESKey + '=')
        self._token = sToken.encode('utf-8')
        self._receive_id = sCorpId.encode('utf-8')
        self._aes = _aes()

    def _cipher(self):
        return self._aes.new(self._key, self._aes.MODE_CBC, self._key[:16])

    def sign(self, timestamp, nonce, encrypt):
        """密文 (bytes) 的签名,40 个小写十六进制字符 (str)。"""
        if not _TIMESTAMP.fullmatch(timestamp) or not _NONCE.fullmatch(nonce):
            raise CryptoError(ierror.WXBizMsgCrypt_ComputeSignature_Error)
        parts = sorted([self._token, timestamp.encode(), nonce.encode(), encrypt])
        return hashlib.sha1(b''.join(parts)).hexdigest()

    def verify(self, msg_signature, timestamp, nonce, encrypt):
        """签名或某一段的格式不对就抛 `CryptoError`;密文 (bytes) 在这以前不必可信。"""
        for name, value, form in (('msg_signature', msg_signature, _SIGNATURE),
                                  ('timestamp', timestamp, _TIMESTAMP), ('nonce', nonce, _NONCE)):
            if not value or not form.fullmatch(str(value)):
                raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, '%s is %s' % (
                    name, 'malformed: ' + _show(value) if value else 'missing in the query'))
        if not _BASE64.fullmatch(encrypt) or len(encrypt) % 4:
            raise CryptoError(ierror.WXBizMsgCrypt_DecodeBase64_Error)
        expected = self.sign(str(timestamp), nonce, encrypt)
        if not hmac.compare_digest(expected.encode(), msg_signature.encode()):
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error)

    def open(self, encrypt):
        """密文 (base64, bytes) → 明文 (str)。先 `verify`,再 `open`。"""
        try:
            data = binascii.a2b_base64(encrypt)
        except ValueError:
            raise CryptoError(ierror.WXBizMsgCrypt_DecodeBase64_Error) from None
        if len(data) < 32 or len(data) % 16:
            raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error, 'ciphertext has %d bytes, '
                              'no multiple of 16: did a proxy cut it?' % len(data))
        data = _unpad(self._cipher().decrypt(data))
        end = 20 + struct.unpack('>I', data[16:20])[0] if len(data) >= 20 else -1
        if not 20 <= end <= len(data):
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer)
        if not hmac.compare_digest(data[end:], self._receive_id):
            theirs, ours = (_mask(i.decode('utf-8', 'replace'))
                            for i in (data[end:], self._receive_id))
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateCorpid_Error, 'receive id differs: '
                              'got %s, corpid here is %s' % (_show(theirs), ours))
        try:
            return data[20:end].decode('utf-8')
        except UnicodeDecodeError:
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, 'not UTF-8') from None

    def seal(self, message):
        """明文 (str 或 UTF-8 的 bytes) → 密文 (base64, bytes)。"""
        try:
            data = message.encode('utf-8') if isinstance(message, str) else bytes(memoryview(message))
        except (UnicodeEncodeError, TypeError):
            raise CryptoError(ierror.WXBizMsgCrypt_EncryptAES_Error) from None
        data = os.urandom(16) + struct.pack('>I', len(data)) + data + self._receive_id
        return binascii.b2a_base64(self._cipher().encrypt(_pad(data)), newline=False)

    def verify_url(self, msg_signature, timestamp, nonce, echostr):
        """「保存」时的 GET 校验 (path/90930):返回要原样答出去的明文 (str)。"""
        encrypt = str(echostr or '').replace(' ', '+').encode('ascii', 'replace')
        self.verify(msg_signature, timestamp, nonce, encrypt)
        return self.open(encrypt)

    def decrypt_message(self, body, msg_signature, timestamp, nonce):
        """收到的信封 (str 或 bytes,XML 或 JSON) → 明文 (str)。"""
        encrypt = _cut_encrypt(body.encode('utf-8', 'replace') if isinstance(body, str) else body)
        self.verify(msg_signature, timestamp, nonce, encrypt)
        return self.open(encrypt)

    def encrypt_message(self, message, nonce, timestamp=None):
        """要回的明文 (str 或 bytes) → 信封 (str)。``timestamp`` 是 Unix 秒,默认现在。"""
        timestamp = str(timestamp or int(time.time()))
        encrypt = self.seal(message)
        return dict_to_xml({'Encrypt': encrypt.decode(),
                            'MsgSignature': self.sign(timestamp, nonce, encrypt),
                            'TimeStamp': int(timestamp), 'Nonce': nonce})

    @_official
    def VerifyURL(self, sMsgSignature, sTimeStamp, sNonce, sEchoStr):
        """`verify_url` 的官方形式:``(0, 明文)`` 或 ``(返回码, None)``。"""
        return self.verify_url(sMsgSignature, sTimeStamp, sNonce, sEchoStr)

    @_official
    def DecryptMsg(self, sPostData, sMsgSignature, sTimeStamp, sNonce):
        """`decrypt_message` 的官方形式:``(0, 明文)`` 或 ``(返回码, None)``。"""
        return self.decrypt_message(sPostData, sMsgSignature, sTimeStamp, sNonce)

    @_official
    def EncryptMsg(self, sReplyMsg, sNonce, timestamp=None):
        """`encrypt_message` 的官方形式:``(0, 信封)`` 或 ``(返回码, None)``。"""
        return self.encrypt_message(sReplyMsg, sNonce, timestamp)
