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
import codecs
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

# OpenWrt 没装 python3-codecs 时没有 idna,连 IP 地址都查不了;这个排在标准的后面,有它就轮不到。
codecs.register(lambda name: None if name != 'idna' else codecs.CodecInfo(
    codecs.ascii_encode, codecs.ascii_decode, name='idna'))

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
    """读不懂的 XML / JSON(-40002),写不成 XML 的内容(-40011),不像样的 EncodingAESKey(-40004)。"""


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
        except (ImportError, AttributeError, OSError):     # OSError:别的机器上编译的
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
    data = json.loads(body.decode('utf-8'), parse_int=len, parse_float=len,
                      parse_constant=int)       # NaN、Infinity:ValueError
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


def _echostr(value):
    """查询串里的 echostr → 密文 (bytes);有的代理把 ``+`` 变成了空格。"""
    return str(value or '').replace(' ', '+').encode('ascii', 'replace')


def _official(method):
    """官方方法的约定:返回 ``(返回码, 值)``,不抛异常。"""
    @functools.wraps(method)
    def code_and_value(*args, **kwargs):
        try:
            return ierror.WXBizMsgCrypt_OK, method(*args, **kwargs)
        except WeChatError as e:
            return e.errcode, None
        except (TypeError, AttributeError):     # None、int:不是它要的 str
            return ierror.WXBizMsgCrypt_ComputeSignature_Error, None
    return code_and_value


class WXBizMsgCrypt:
    """一个应用的验签和加解密,与官方示例同名同参。

    ``sToken`` 和 ``sEncodingAESKey``(恰好 43 个字符)在「应用管理 → 应用 → 接收消息 → 设置API接收」;
    ``sCorpId`` 是企业ID,第三方套件用 SuiteID,智能机器人用空字符串。
    密钥不对抛 `FormatException` (-40004),没有 AES 抛 `ImportError`,其中写着怎么装。
    """

    def __init__(self, sToken, sEncodingAESKey, sCorpId):
        if not re.fullmatch('[A-Za-z0-9+/]{43}', sEncodingAESKey):
            others = len(re.findall('[^A-Za-z0-9+/]', sEncodingAESKey))
            raise FormatException(ierror.WXBizMsgCrypt_IllegalAesKey, 'EncodingAESKey must be 43 '
                                  'characters of A-Z a-z 0-9, got %d%s' % (
                                      len(sEncodingAESKey) - others, ' and %d others' % others * bool(others)))
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
        encrypt = _echostr(echostr)
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


# ---- 配置 Configuration -----------------------------------------------------------------------
# config.ini:每个应用一节,[system] 放其余的;文件里没写的由环境变量 EASYWECHAT_<大写的键> 补上,
# 关键字参数优先于两者。首尾的空白和引号去掉;'%' 不是特殊字符。

_APP_KEYS = ('corpid', 'secret', 'appid', 'agentid', 'token', 'encoding_aes_key', 'touser',
             'robot', 'api_base')
_SYSTEM_KEYS = 'route_name', 'log_path', 'log_name'

_BLANKS = ' \t\r\n\u00a0\u200b\u3000\ufeff'

#: --init 写出的文件;config.ini.example 就是它,空着两个密钥。
_CONFIG_TEMPLATE = """\
# EasyWeChat 的配置。一节是一个应用,节名就是 WeChatServer('demo') 里的名字。
# 管理后台:https://work.weixin.qq.com/wework_admin/
# 这个文件里有密钥:chmod 600 config.ini

[demo]
# 企业ID:「我的企业 → 企业信息」最下面,ww 开头,18 个字符
corpid = {corpid}
# Token 和 EncodingAESKey:「应用管理 → 自建 → 你的应用 → 接收消息 → 设置API接收」。
# 两边要一样:把这里的抄到后台,或把后台随机生成的抄到这里(EncodingAESKey 恰好 43 个字符)
token = {token}
encoding_aes_key = {encoding_aes_key}

[system]
# 回调 URL 的路径:http://你的地址:端口/weixin
route_name = weixin
# 日志文件的目录和文件名;不写目录就只输出到 stderr
log_path =
log_name = easywechat.log
"""


class _Settings(dict):
    """一个应用的设置;``repr`` 只有键名,不会把密钥带进日志。"""

    def __repr__(self):
        return '<settings: %s>' % ', '.join(sorted(key for key in self if self[key]))


def _config_paths(ini_name):
    """依次要找的配置文件。"""
    if ini_name or os.environ.get('EASYWECHAT_CONFIG'):
        return [os.path.abspath(ini_name or os.environ['EASYWECHAT_CONFIG'])]
    script = getattr(sys.modules.get('__main__'), '__file__', None) or __file__
    folders = os.path.dirname(script), os.getcwd(), os.path.dirname(__file__)
    return list(collections.OrderedDict.fromkeys(
        os.path.join(os.path.abspath(folder), 'config.ini') for folder in folders))


def _check_mode(path):
    """里面有密钥的文件:别人能改就不读,别人能读就提醒。"""
    mode = os.stat(path).st_mode if os.name == 'posix' else 0
    if mode & 0o002:
        raise ConfigError('%s can be changed by anybody, not read: chmod 600 it' % path)
    if mode & 0o004:
        logger.warning('%s can be read by anybody: chmod 600 it', path)


def _read_ini(path):
    """ini 文件 → `configparser.ConfigParser`。UTF-8(可有 BOM),否则当作 GB18030。"""
    try:
        _check_mode(path)
        with open(path, 'rb') as f:
            data = f.read(1 << 20)
    except OSError as e:
        raise ConfigError('cannot read %s: %s' % (path, e.strerror)) from None
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=('#', ';'))
    try:
        try:
            text = data.decode('utf-8-sig')
        except UnicodeDecodeError:
            text = data.decode('gb18030')
        parser.read_string(text)
    except (UnicodeDecodeError, LookupError):
        raise ConfigError('%s is neither UTF-8 nor GB18030' % path) from None
    except configparser.Error as e:         # 它的文字里有出错的那一行,可能是密钥
        line = getattr(e, 'lineno', None) or (getattr(e, 'errors', None) or [['?']])[0][0]
        raise ConfigError('%s, line %s: %s' % (path, line, type(e).__name__)) from None
    return parser


def _clean(value):
    """去掉首尾的空白(包括全角的和看不见的)和一对引号。"""
    value = value.strip(_BLANKS)
    if len(value) > 1 and value[0] == value[-1] and value[0] in '\'"':
        value = value[1:-1].strip(_BLANKS)
    return value


def get_config(appname, ini_name=None, **settings):
    """应用 ``appname`` 的设置,一个 dict;没写的键是 ``''``,``agentid`` 与 ``appid`` 相同。

    依次找 ``ini_name``,否则环境变量 ``EASYWECHAT_CONFIG``,否则脚本的目录、当前目录、本文件的目录里的
    config.ini。环境变量 ``EASYWECHAT_CORPID`` 等补上没写的;关键字参数盖过其余的。
    找不到、读不懂、没有这一节,抛 `ConfigError`,其中有试过的每个路径。
    """
    unknown = set(settings) - set(_APP_KEYS + _SYSTEM_KEYS)
    if unknown:
        raise TypeError('no such setting: %s' % ', '.join(sorted(unknown)))
    paths = _config_paths(ini_name)
    path = next((p for p in paths if os.path.isfile(p)), None)
    values = _Settings.fromkeys(_APP_KEYS + _SYSTEM_KEYS, '')
    if path:
        ini = _read_ini(path)
        if not ini.has_section(appname) and not settings:
            raise ConfigError('no [%s] in %s; it has: %s' % (
                appname, path, ', '.join('[%s]' % _show(s) for s in ini.sections())))
        for section, keys in (appname, _APP_KEYS), ('system', _SYSTEM_KEYS):
            if ini.has_section(section):
                values.update((k, _clean(ini.get(section, k, fallback=''))) for k in keys)
    for key in values:
        values[key] = values[key] or _clean(os.environ.get('EASYWECHAT_' + key.upper(), ''))
    values.update((k, _clean(str(v))) for k, v in settings.items())
    if not path and (ini_name or not any(values[k] for k in _APP_KEYS)):
        raise ConfigError('no configuration found; tried: %s' % ', '.join(paths))
    values['agentid'] = values['appid'] = values['agentid'] or values['appid']
    return values


# ---- 存储 Store -------------------------------------------------------------------------------
# 认领过的消息放在这里,接口是 redis-py 的三个方法:get、set(ex=, nx=)、delete。

class MemoryStore:
    """进程内的存储,按条数和字节数封顶,最旧的先出去。任何线程都可以用。"""

    #: 最多多少条。
    max_entries = 10000
    #: 名字和值一共最多多少字节。
    max_bytes = 4 << 20

    _clock = staticmethod(time.monotonic)

    def __init__(self):
        self._lock = threading.Lock()
        self._entries = collections.OrderedDict()       # 名字 → (到期的时刻, 值)
        self._bytes = 0

    def _drop(self, name):
        self._bytes -= len(name) + len(self._entries.pop(name)[1])

    def _find(self, name, now):
        if name in self._entries and self._entries[name][0] <= now:
            self._drop(name)
        return self._entries.get(name)

    def get(self, name):
        """``name`` (str) 的值 (bytes);没有或到期了是 None。"""
        with self._lock:
            entry = self._find(name, self._clock())
            return entry and entry[1]

    def set(self, name, value, ex=None, nx=False):
        """记下 ``value`` (bytes),``ex`` 秒后到期;``nx`` 为真时只在没有的时候记。记了返回 True,否则 None。"""
        now = self._clock()
        with self._lock:
            if self._find(name, now):
                if nx:
                    return None
                self._drop(name)
            self._entries[name] = (now + ex if ex else float('inf'), value)
            self._bytes += len(name) + len(value)
            while len(self._entries) > self.max_entries or self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
            return True

    def delete(self, name):
        """删掉 ``name``;返回删了几条 (int)。"""
        with self._lock:
            if not self._find(name, self._clock()):
                return 0
            self._drop(name)
            return 1


# ---- 消息 Messages ----------------------------------------------------------------------------
# 回调返回的东西 → 被动回复的字段(path/90241「被动回复消息格式」)。

#: MsgType → 它自己的字段;别的字段(比如原样返回的 MsgId)不发出去。
_REPLY_FIELDS = {
    'text': ('Content',), 'image': ('Image',), 'voice': ('Voice',), 'video': ('Video',),
    'news': ('ArticleCount', 'Articles'), 'update_button': ('Button',),
    'update_template_card': ('TemplateCard',), 'update_taskcard': ('TaskCard',),
}
_TEXT_BYTES = 2048


def _cut_text(text):
    """企业微信的文本最多 2048 字节,多的不显示:在字与字之间截断,并且说出来。"""
    data = text.encode('utf-8', 'ignore')
    if len(data) <= _TEXT_BYTES:
        return text
    logger.warning('a text of %d bytes was cut to the %d that WeCom shows', len(data), _TEXT_BYTES)
    return data[:_TEXT_BYTES].decode('utf-8', 'ignore')


def _reply_fields(msg_type, result):
    """``result`` 里属于 ``msg_type`` 的字段;平放的 MediaId 包好,Articles 可以是 list。"""
    fields = {name: result[name] for name in _REPLY_FIELDS[msg_type] if name in result}
    name = _REPLY_FIELDS[msg_type][-1]
    if name not in fields and 'MediaId' in result and msg_type in ('image', 'voice', 'video'):
        fields[name] = {k: result[k] for k in ('MediaId', 'Title', 'Description') if k in result}
    if name not in fields:
        raise TypeError('a reply of type %s needs %s' % (msg_type, name))
    if msg_type == 'text':
        fields['Content'] = _cut_text(str(fields['Content']))
    if msg_type == 'news':
        articles = fields['Articles']
        items = articles.get('item') if isinstance(articles, dict) else articles
        items = [items] if isinstance(items, dict) else items
        if not isinstance(items, (list, tuple)) or not 1 <= len(items) <= 8:
            raise TypeError('Articles must be a list of 1 to 8 dicts')
        fields = {'ArticleCount': len(items), 'Articles': {'item': items}}
    return fields


def _build_reply(result, msg_type, user, corp, now):
    """回调的返回值 → 完整的回复 dict;None → None。别的类型抛 `TypeError`。"""
    if result is None:
        return None
    if isinstance(result, str):
        result = {'MsgType': 'text', 'Content': result}
    if not isinstance(result, dict):
        raise TypeError('a callback returns str, dict or None, got %s' % type(result).__name__)
    by_field = (kind for kind, names in _REPLY_FIELDS.items() if names[-1] in result)
    msg_type = result.get('MsgType') or next(by_field, msg_type)
    if msg_type not in _REPLY_FIELDS:
        raise TypeError('%s is no type of passive reply; these are: %s' % (
            _show(repr(msg_type)), ', '.join(_REPLY_FIELDS)))
    reply = {'ToUserName': user, 'FromUserName': corp, 'CreateTime': int(now), 'MsgType': msg_type}
    reply.update(_reply_fields(msg_type, result))
    return reply


# ---- 回调模式 Dispatcher ----------------------------------------------------------------------
# 字节进来,完整的回答 (status, headers, body) 出去;这里没有套接字。
# 顺序:限制 → 切信封 → 格式 → 签名 → 时间 → AES → 填充、长度、receiveid → 里面的 XML → 认领 → 回调。
# 一条消息只跑一次回调:先认领(存储里的一条记录),再跑;重复投递得到存下的答复,或等同一次还没跑完的回调。

class _Threads:
    """一些留着的线程:有空闲的就用最近用过的那条,没有才开新的,最多 ``limit`` 条。"""

    #: 每条线程的栈,字节。musl 的默认值 128 KiB 太小,几层嵌套就能让进程崩溃。
    stack_size = 1 << 20
    #: 空闲这么多秒的线程结束。
    idle = 10

    _starting = threading.Lock()        # threading.stack_size 是整个进程的

    def __init__(self, limit):
        self._limit = limit
        self._lock = threading.Lock()
        self._free = threading.Semaphore(limit)
        self._waiting = []              # 空闲线程的座位 [叫醒它的锁, 它的活],后进先出

    def submit(self, wait, job, *args):
        """交出一件活,最多等 ``wait`` 秒有线程空出来;没有返回 False。"""
        if not self._free.acquire(timeout=wait):
            return False
        with self._lock:
            seat = self._waiting.pop() if self._waiting else None
        if seat:
            seat[1] = job, args
            seat[0].release()
            return True
        return self._start((job, args))

    def _start(self, work):
        with self._starting:
            before = threading.stack_size(self.stack_size)
            try:
                threading.Thread(target=self._run, args=(work,), daemon=True).start()
                return True
            except RuntimeError:        # can't start new thread
                self._free.release()
                return False
            finally:
                threading.stack_size(before)

    def _run(self, work):
        seat = [threading.Lock(), None]
        seat[0].acquire()
        while work:
            job, args = work
            job(*args)
            work = job = args = seat[1] = None
            with self._lock:
                self._waiting.append(seat)
            self._free.release()
            if not seat[0].acquire(timeout=self.idle):
                with self._lock:
                    if seat in self._waiting:
                        self._waiting.remove(seat)
                        return
                seat[0].acquire()       # 活正在路上
            work = seat[1]

    def close(self, deadline):
        """不再接活,等手里的做完,至多到 ``deadline`` (monotonic 秒);都做完了返回 True。"""
        done = all(self._free.acquire(timeout=max(0, deadline - time.monotonic()))
                   for _ in range(self._limit))
        with self._lock:
            seats, self._waiting = self._waiting, []
        for seat in seats:
            seat[0].release()
        return done


class _RefusalLog:
    """拒绝的日志:每个地址每分钟最多 10 行,其余的只计数,一分钟后说总数。"""

    #: 每个地址每分钟几行;最多记多少个地址,再多的合在一起。
    lines, addresses = 10, 1000

    _clock = staticmethod(time.monotonic)

    def __init__(self):
        self._lock = threading.Lock()
        self._since = self._clock()
        self._count = {}

    def _summary(self):
        """一分钟过去了:返回没写出来的数目,重新计数。"""
        count, self._count, self._since = self._count, {}, self._clock()
        return [(who, n - self.lines) for who, n in count.items() if n > self.lines]

    def write(self, client, error):
        """记一次拒绝。"""
        with self._lock:
            more = self._summary() if self._clock() - self._since >= 60 else ()
            if client not in self._count and len(self._count) >= self.addresses:
                client = 'other addresses'
            n = self._count[client] = self._count.get(client, 0) + 1
        for who, suppressed in more:
            logger.warning('refused %d more from %s', suppressed, _show(who))
        if n <= self.lines:
            logger.warning('refused %s with %d: %s%s', _show(client) or 'a request', error.status,
                           _show(error.errmsg, 400), ' (more are counted)' * (n == self.lines))


#: wecom 文档里的消息类型和事件,用来提醒写错的名字;新的类型照样可以登记。
_TYPES = frozenset('text image voice video shortvideo location link file event *'.split())
_EVENTS = frozenset(
    'subscribe unsubscribe enter_agent LOCATION batch_job_result change_contact click view '
    'view_miniprogram scancode_push scancode_waitmsg pic_sysphoto pic_photo_or_album pic_weixin '
    'location_select template_card_event template_card_menu_event taskcard_click '
    'open_approval_change sys_approval_change share_agent_change share_chain_change '
    'inactive_alert low_active_alert close_inactive_agent reopen_inactive_agent low_active '
    'active_restored upload_media_job_finish kf_msg_or_event kf_account_auth_change '
    'change_external_contact change_external_chat change_external_tag change_chain security '
    'living_status_change msgaudit_notify unlicensed_notify delete_calendar modify_calendar '
    'modify_schedule delete_schedule respond_schedule doc_change smart_sheet_change '
    'meeting_change meeting_statistics app_email_change public_email_change '
    'customer_acquisition'.split())
_TYPE_FORM = re.compile(r'\*|[A-Za-z][A-Za-z0-9_]*|event:[A-Za-z][A-Za-z0-9_]*')

#: 没有 MsgId 的(事件)靠这些字段认出来,找遍根和它的 BatchJob、ApprovalInfo:谁、何时、什么事、哪一个。
_EVENT_KEY = re.compile('FromUserName|CreateTime|MsgType|ChangeType|Token'
                        '|[A-Za-z]*(?:Event|Key|I[dD]s?|No|Status)')

_PARAMETERS = 'msg_signature', 'timestamp', 'nonce', 'echostr'

_RELEASED = 1795392000      # 2026-11-23:比这还早的时钟是没有校过的


def _parse_query(query):
    """查询串 → 四个参数里有的那些。每个最多一次,百分号解码一次,严格 UTF-8。"""
    found = {}
    try:
        if query.count('&') >= 16:
            raise ValueError('more than 16 parameters in the query')
        for name, value in urllib.parse.parse_qsl(query, True, errors='strict'):
            if name in found:
                raise ValueError('%s stands twice in the query' % name)
            if name in _PARAMETERS:
                found[name] = value
    except ValueError as e:
        raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, str(e)) from None
    return found


def _body_length(fields, limit):
    """POST 的正文长度 (int);``fields`` 是小写名字的头部。规则见 RFC 9112 §6,从严。"""
    length = fields.get('content-length')
    if 'transfer-encoding' in fields or length is None:
        raise WeChatError(400 if length is not None else 411)
    if 'content-encoding' in fields:
        raise WeChatError(400, 'Content-Encoding is not supported')
    if not re.fullmatch('[0-9]{1,9}', length):
        raise WeChatError(400, 'malformed Content-Length')
    if int(length) > limit:
        raise WeChatError(413, 'body of %s bytes, max_body is %d' % (length, limit))
    return int(length)


class _Run:
    """一次正在跑的回调;重复投递在这里等同一个结果。"""

    __slots__ = 'done', 'reply', 'waiting'

    def __init__(self):
        self.done = threading.Event()
        self.reply = None               # bytes;b'' 是空的 200,None 是没有答案
        self.waiting = 0

    def finish(self, reply):
        self.reply = reply
        self.done.set()


class Dispatcher:
    """一个应用的回调:登记函数,把 HTTP 请求变成回答。

    ``appname``、``ini_name`` 和设置同 `get_config`;缺少 corpid、token 或 encoding_aes_key,抛 `ConfigError`。
    本身是 WSGI 可调用对象(PEP 3333);别的框架用 `handle`。类属性都可以在子类里改。
    """

    #: 请求正文的上限,字节。
    max_body = 1 << 20
    #: 请求里的时间与本机最多差多少秒;0 是不检查。
    max_skew = 300
    #: 一次投递等回调的秒数。企业微信等 5 秒就断开、再投递:多等一点,断开的就总是它,隔着代理也一样。
    answer_within = 6
    #: 同时最多跑多少个回调;再多的等前面的,等不到的由企业微信重新投递。
    max_callbacks = 32

    _now = staticmethod(time.time)

    def __init__(self, appname='demo', ini_name=None, **settings):
        self.appname = appname
        self.settings = get_config(appname, ini_name, **settings)
        for key in 'corpid', 'token', 'encoding_aes_key':
            if not self.settings[key]:
                raise ConfigError('%s is missing: set it in [%s] of config.ini, or EASYWECHAT_%s'
                                  % (key, appname, key.upper()))
        self.route = (self.settings['route_name'] or 'weixin').strip('/')
        if not re.fullmatch('[A-Za-z0-9_.~/-]+', self.route):
            raise ConfigError('route_name takes A-Z a-z 0-9 _ . ~ - and /')
        #: 加解密,`WXBizMsgCrypt`。
        self.wxcpt = WXBizMsgCrypt(self.settings['token'], self.settings['encoding_aes_key'],
                                   self.settings['corpid'])
        #: 为真时,回调出错会把 traceback 的最后一行作为文本回给用户。
        self.debug = False
        self.store = MemoryStore()
        self._callbacks = {}
        self._patterns = []
        self._running = {}
        self._threads = _Threads(self.max_callbacks)
        self._refusals = _RefusalLog()
        self._clock_warned = False

    def __repr__(self):
        return '<%s %s, corpid %s>' % (type(self).__name__, self.appname,
                                       _mask(self.settings['corpid']))

    @property
    def app(self):
        """自己:WSGI 可调用对象,例如 ``gunicorn bot:server.app``。"""
        return self

    # 登记

    def register_callback(self, msg_type, func=None, pattern=None):
        """登记回调;不给 ``func`` 就是装饰器。

        ``msg_type``:消息类型 ``'text'``、``'image'``…,``'event'``,某个事件 ``'event:click'``
        (事件名与收到的 Event 一字不差),或其余的一切 ``'*'``;最具体的优先。
        ``pattern`` (str 或编译过的正则,只用于 text) 要匹配整条文本,各个组接在消息后面作为参数;
        先登记的先试,都不匹配才轮到 ``text`` 的普通回调。

            @server.register_callback('text', pattern=r'温度\\s*(\\w+)')
            def temperature(msg, room):
                return room + ' 21°C'
        """
        if not isinstance(msg_type, str) or not _TYPE_FORM.fullmatch(msg_type):
            raise ValueError("no message type: %r; write @server.register_callback('text')"
                             % (msg_type,))
        if func is None:
            return functools.partial(self._register, msg_type, pattern)
        return self._register(msg_type, pattern, func)

    def _register(self, msg_type, pattern, func):
        if not callable(func):
            raise TypeError('a callback must be callable, got %s: did you mean one of its methods?'
                            % type(func).__name__)
        known = _EVENTS if msg_type.startswith('event:') else _TYPES
        name = msg_type.partition(':')[2] or msg_type
        if name not in known:
            import difflib
            close = difflib.get_close_matches(name, known)
            logger.warning('%s is not among the types that this version knows%s', msg_type,
                           '; close: ' + ', '.join(close) if close else '')
        if pattern is None:
            self._callbacks[msg_type] = func
        elif msg_type == 'text':
            self._patterns.append((re.compile(pattern), func))
        else:
            raise ValueError('pattern goes with text only, not with %s' % msg_type)
        return func

    def _find_callback(self, msg):
        """(函数, 附加的参数);没有登记是 (None, ())。"""
        kind = str(msg.get('MsgType', ''))
        if kind == 'text':
            for pattern, func in self._patterns:
                match = pattern.fullmatch(str(msg.get('Content', '')))
                if match:
                    return func, match.groups()
        names = ['event:%s' % msg.get('Event', '')] if kind == 'event' else []
        for name in names + [kind, '*']:
            if name in self._callbacks:
                return self._callbacks[name], ()
        return None, ()

    # 认领、运行

    def _claim_name(self, msg):
        """存储里的名字:同一条消息的每次投递都一样。"""
        if msg.get('MsgId'):
            parts = ['MsgId', str(msg['MsgId'])]
        else:
            places = [msg] + [v for v in (msg.get('BatchJob'), msg.get('ApprovalInfo'))
                              if isinstance(v, dict)]
            parts = ['%s=%s' % item for place in places for item in sorted(place.items())
                     if _EVENT_KEY.fullmatch(item[0])]
        parts = [self.settings['corpid'], self.settings['agentid']] + parts
        digest = hashlib.sha1('\0'.join(parts).encode('utf-8', 'replace')).hexdigest()
        return 'easywechat:message:' + digest

    def _keep(self):
        """答复留多少秒:时间窗口的两倍,重放的旧请求就总会遇到它。"""
        return max(2 * self.max_skew, 600)

    def _work(self, name, run, msg):
        """在留着的线程上:跑回调,存下答复,叫醒等着的投递。"""
        reply, begin = b'', time.monotonic()
        try:
            head = [str(msg.get(k, '')) for k in ('MsgType', 'FromUserName', 'ToUserName')]
            fields = self._call(msg, head)
            if fields:
                reply = dict_to_xml(fields).encode('utf-8')
        except BaseException:           # _call 自己不抛;到这里是本文件的错,仍要叫醒等着的
            logger.error('internal error after the callback%s', _traceback())
        finally:
            self.store.set(name, b'+' + reply, ex=self._keep())
            if reply and not run.waiting and time.monotonic() - begin > self.answer_within:
                logger.warning('the answer to %s came after %.0f s, when nobody waited for it',
                               _show(msg.get('FromUserName')), time.monotonic() - begin)
            run.finish(reply)
            del self._running[name]

    def _call(self, msg, head):
        """用户的回调,和它返回的东西。出错记日志;企业微信得到空的 200,否则它会再投递。"""
        func, args = self._find_callback(msg)
        if func is None:
            logger.debug('no callback for %s', _show(head[0]))
            return None
        try:
            return self._checked(func(msg, *args), head)
        except BaseException as e:      # 用户的代码,连 sys.exit() 也在内
            logger.error('callback %s failed on %s from %s%s',
                         getattr(func, '__qualname__', repr(func)), _show(head[0]),
                         _show(head[1]), _traceback())
            text = '%s: %s' % (type(e).__name__, e)
            return self._checked(text, head) if self.debug else None

    def _checked(self, result, head):
        """返回值 → 回复的 dict;写不成 XML 的在这里就报出来,算作回调的错。"""
        fields = _build_reply(result, *head, now=self._now())
        if fields:
            dict_to_xml(fields)
        return fields

    def _begin(self, name, run, msg):
        """认领到了就跑;已经答过的,把存下的答复交出去。"""
        if self.store.set(name, b'-', ex=self._keep(), nx=True):
            if self._threads.submit(self.answer_within, self._work, name, run, msg):
                return
            self.store.delete(name)
            logger.error('all %d callbacks are busy; WeCom will deliver again', self.max_callbacks)
        stored = self.store.get(name) or b'-'
        del self._running[name]
        run.finish(stored[1:] if stored[:1] == b'+' else None)

    def _deliver(self, msg):
        """一次投递:跑回调,或等同一条消息正在跑的那次。返回回复的 XML (bytes),空的是没有回复。"""
        name = self._claim_name(msg)
        mine = _Run()
        run = self._running.setdefault(name, mine)
        if run is mine:
            self._begin(name, run, msg)
        run.waiting += 1
        try:
            if run.waiting > 3 or not run.done.wait(self.answer_within) or run.reply is None:
                raise WeChatError(503, 'no answer yet; the next delivery joins the callback')
            return run.reply
        finally:
            run.waiting -= 1

    # 请求 → 回答

    def _open(self, query, encrypt):
        """验签、看时间、解密 → 明文 (str)。"""
        self.wxcpt.verify(query.get('msg_signature'), query.get('timestamp'), query.get('nonce'),
                          encrypt)
        self._check_fresh(query['timestamp'])
        return self.wxcpt.open(encrypt)

    def _check_fresh(self, timestamp):
        now = self._now()
        if now < _RELEASED:
            if not self._clock_warned:
                self._clock_warned = True
                logger.warning('the clock says %s, before this release: not set? check NTP',
                               time.strftime('%Y-%m-%d', time.gmtime(now)))
        elif self.max_skew and abs(now - int(timestamp)) > self.max_skew:
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, 'timestamp %s, clock '
                              'here %d: more than %d s apart, check NTP'
                              % (timestamp, now, self.max_skew))

    def _receive(self, query, body):
        """POST 的信封 → 回复的信封 (bytes)。"""
        text = self._open(query, _cut_encrypt(body))
        try:
            msg = xml_to_dict(text)
        except FormatException as e:
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, e.errmsg) from None
        logger.debug('message %.2000s', msg)
        reply = self._deliver(msg)
        if not reply:
            return b''
        # 时间照抄请求的:刚验过,而这里的时钟可能没有校过
        return self.wxcpt.encrypt_message(reply, query['nonce'], query['timestamp']).encode('utf-8')

    def _answer(self, method, target, body):
        """(Content-Type, 正文 bytes);拒绝抛 `WeChatError`。"""
        path, _, query = target.partition('?')
        if not (path.rstrip('/') if path[-2:] != '//' else path).endswith('/' + self.route):
            raise WeChatError(404, 'path %s, expected /%s' % (_show(path), self.route))
        if method not in ('GET', 'HEAD', 'POST'):
            raise WeChatError(405)
        if method == 'POST':
            if len(body) > self.max_body:
                raise WeChatError(413)
            return 'text/xml; charset=utf-8', self._receive(_parse_query(query), body)
        if not query:
            return 'text/plain; charset=utf-8', b'' if method == 'HEAD' else \
                b'EasyWeChat is up. Enter this URL in the console of WeCom.\n'
        query = _parse_query(query)
        echo = self._open(query, _echostr(query.get('echostr')))
        return 'text/plain; charset=utf-8', b'' if method == 'HEAD' else echo.encode('utf-8')

    def refuse(self, error, client=''):
        """一个 `WeChatError` → 记下原因,返回没有正文的回答。"""
        if error.status != 503:
            self._refusals.write(client, error)
        headers = [('Content-Type', 'text/plain; charset=utf-8'), ('Content-Length', '0'),
                   ('X-Content-Type-Options', 'nosniff')]
        if error.status == 405:
            headers.append(('Allow', 'GET, HEAD, POST'))
        return error.status, headers, b''

    def handle(self, method, target, body=b'', client=''):
        """一个请求 → ``(status, headers, body)``,不抛异常。任何线程都可以用。

        ``method`` 和 ``target``(路径和查询串,没有解码过)是 str,``body`` 是 bytes,``client`` 是对方的
        地址,只用于日志。``status`` (int) 503 是现在没有答案:能断开连接的外壳断开,企业微信就会再投递。
        """
        try:
            content_type, answer = self._answer(method, target, body)
        except WeChatError as e:
            return self.refuse(e, client)
        except Exception:               # 最后一道:不许有请求让服务器停下
            logger.error('internal error%s', _traceback())
            return self.refuse(WeChatError(500), client)
        return 200, [('Content-Type', content_type), ('Content-Length', str(len(answer))),
                     ('X-Content-Type-Options', 'nosniff')], answer

    def __call__(self, environ, start_response):
        """WSGI (PEP 3333)。"""
        client = environ.get('REMOTE_ADDR', '')
        method = environ['REQUEST_METHOD']
        path = environ.get('SCRIPT_NAME', '') + environ.get('PATH_INFO', '')
        target = urllib.parse.quote(path, safe="/%:@!$&'()*+,;=~", encoding='latin-1')
        if environ.get('QUERY_STRING'):
            target += '?' + environ['QUERY_STRING']
        fields = {name: environ[key] for name, key in (
            ('content-length', 'CONTENT_LENGTH'), ('content-encoding', 'HTTP_CONTENT_ENCODING'),
            ('transfer-encoding', 'HTTP_TRANSFER_ENCODING')) if environ.get(key)}
        try:
            body = b''
            if method == 'POST':
                length = _body_length(fields, self.max_body)
                body = environ['wsgi.input'].read(length)
                if len(body) < length:
                    raise WeChatError(400, 'body shorter than its Content-Length')
            status, headers, body = self.handle(method, target, body, client)
        except WeChatError as e:
            status, headers, body = self.refuse(e, client)
        start_response('%d %s' % (status, http.client.responses[status]), headers)
        return [body]


# ---- 服务器 Server ----------------------------------------------------------------------------
# http.server 的外壳:一个连接一个请求,一个严格的读法,一次 sendall,关闭。它什么也不决定,只抄 handle 的回答。
# 时限都是总数,走一个字节不会重新计时;连接满了,关掉读得最久的那个,正在等回调的从不关。

#: 请求行和头部 (RFC 9112 §3、§5):大写的方法,以一个 / 开头的可见 ASCII,名字是 token,没有折行。
_HEAD = re.compile(rb'([A-Z]{1,16}) (/(?!/)[!-~]*) HTTP/1\.[01]\r\n'
                   rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)")
#: 半个请求行至少要像的样子;TLS、SSH、杂音在头几个字节就露馅。
_HEAD_START = re.compile(rb'[A-Z]{1,16}(?:\Z| (?:\Z|/(?!/)))')
_ONCE = frozenset(['host', 'content-length', 'transfer-encoding', 'content-encoding', 'expect'])


def _parse_head(head):
    """空行以前的 bytes → ``(方法, 目标, 头部)``;头部是 dict,名字小写。不合规矩抛 `WeChatError`。"""
    match = _HEAD.fullmatch(head)
    if not match:
        raise WeChatError(400)
    lines = match.group(3).decode('latin-1').split('\r\n')[:-1]
    if len(lines) > 64:
        raise WeChatError(431)
    fields = {}
    for line in lines:
        name, _, value = line.partition(':')
        name = name.lower()
        if name in fields and name in _ONCE:
            raise WeChatError(400, '%s stands twice in the head' % name)
        fields[name] = value.strip(' \t')
    return match.group(1).decode(), match.group(2).decode(), fields


class _Gone(Exception):
    """对方走了,或在时限内没有说完:关闭,什么也不答。"""


class _Handler(http.server.BaseHTTPRequestHandler):
    """一个连接。`BaseHTTPRequestHandler` 逐行读、分几次写;这里都在套接字上做。"""

    def setup(self):
        self._rest = b''            # 读进来、还没用掉的
        self._refused = False

    def finish(self):
        """基类在这里收拾 rfile 和 wfile;这里没有。"""

    def handle(self):
        app = self.server.dispatcher
        client = self.client_address[0]
        try:
            try:
                method, target, body = self._read_request(app)
            except WeChatError as e:
                self._refused = True
                answer = app.refuse(e, client)
            else:
                self.server.done_reading(self.request)
                answer = app.handle(method, target, body, client)
            if answer[0] != 503:    # 503:断开,企业微信就会再投递;答了 503 却未必
                self._write(*answer)
        except (_Gone, OSError) as e:
            logger.debug('%s is gone: %s', client, _show(e))

    def _receive(self, deadline):
        """再读一些,至多到 ``deadline`` (monotonic 秒)。"""
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Gone('out of time')
        self.request.settimeout(left)
        try:
            data = self.request.recv(1 << 16)
        except socket.timeout:
            raise _Gone('out of time') from None
        if not data:
            raise _Gone('closed early')
        return data

    def _read_head(self, deadline):
        """读到空行为止,返回空行以前的 bytes;多读的留在 ``_rest``。"""
        server, data = self.server.dispatcher, b''
        while True:
            data += self._receive(deadline)
            end = data.find(b'\r\n\r\n')
            line = data.find(b'\r\n')
            if not _HEAD_START.match(data):
                hint = ': TLS on a plain port? let a reverse proxy do TLS' * (data[0] == 22)
                raise WeChatError(400, _ERRORS[400][1] + hint)
            if line > server.max_line or (line < 0 and len(data) > server.max_line):
                raise WeChatError(414)
            if end > server.max_head or (end < 0 and len(data) > server.max_head):
                raise WeChatError(431)
            if end >= 0:
                self._rest = data[end + 4:]
                return data[:end + 2]

    def _read_request(self, app):
        """``(方法, 目标, 正文)``。"""
        begin = time.monotonic()
        method, target, fields = _parse_head(self._read_head(begin + app.head_within))
        if method != 'POST':
            return method, target, b''
        length = _body_length(fields, app.max_body)
        parts, missing = [self._rest[:length]], length - len(self._rest)
        self._rest = self._rest[length:]
        if missing > 0 and fields.get('expect', '').lower() == '100-continue':
            self.request.settimeout(app.write_within)
            self.request.sendall(b'HTTP/1.1 100 Continue\r\n\r\n')
        while missing > 0:
            self.server.has_read(self.request, len(parts[-1]))
            data = self._receive(begin + app.request_within)
            parts.append(data[:missing])
            self._rest = data[missing:]
            missing -= len(data)
        return method, target, b''.join(parts)

    def _write(self, status, headers, body):
        head = ['HTTP/1.1 %d %s' % (status, http.client.responses[status])]
        for name, value in headers:
            if _UNPRINTABLE.search(value):
                raise ValueError('control character in header %s' % name)
            head.append('%s: %s' % (name, value))
        head.append('Connection: close\r\n\r\n')
        self.request.settimeout(self.server.dispatcher.write_within)
        self.request.sendall('\r\n'.join(head).encode('latin-1') + body)
        if self._refused or self._rest:
            self._linger()

    def _linger(self):
        """对方还在发:读掉一些再关,不然内核发 RST,刚写的回答到不了。"""
        deadline, left = time.monotonic() + 0.3, 1 << 19
        self.request.shutdown(socket.SHUT_WR)
        while left > 0:
            left -= len(self._receive(deadline))


class _HTTPServer(http.server.HTTPServer):
    """`HTTPServer` 加上:不查 DNS、留着的线程、连接的上限。"""

    request_queue_size = 1024               # 默认的 5 让一千个连接排 24 秒
    allow_reuse_address = os.name == 'posix'
    allow_reuse_port = False

    def __init__(self, dispatcher, host, port):
        self.dispatcher = dispatcher
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self._lock = threading.Lock()
        self._reading = collections.OrderedDict()       # 还在读的套接字,旧的在前 → 读了多少字节正文
        self._most = self._limit(dispatcher.max_connections)
        self._threads = _Threads(self._most + 2 * dispatcher.max_callbacks)
        super().__init__((host, port), _Handler)

    @staticmethod
    def _limit(wanted):
        """描述符少的系统上,连接也要少。"""
        try:
            import resource
        except ImportError:                 # Windows
            return wanted
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return wanted if soft < 0 else max(1, min(wanted, soft // 4))

    def server_bind(self):
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)        # HTTPServer 的会反查 DNS
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self):
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                self._evict(8)
                time.sleep(0.05)            # serve_forever 会马上再来
            raise

    def _evict(self, count):
        """不再读最旧的几个。只关读的方向:已经到了的请求照样读完、回答。"""
        with self._lock:
            for _ in range(min(count, len(self._reading))):
                oldest, _ = self._reading.popitem(last=False)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RD)

    def has_read(self, request, count):
        """又读了 ``count`` 字节正文;所有连接加起来太多,最旧的就不再读。"""
        with self._lock:
            if request in self._reading:
                self._reading[request] += count
            full = sum(self._reading.values()) > self.dispatcher.max_reading
        if full:
            self._evict(1)

    def done_reading(self, request):
        """请求读完了:这个连接不再占读的名额。"""
        with self._lock:
            self._reading.pop(request, None)

    def process_request(self, request, client_address):
        if len(self._reading) >= self._most:
            self._evict(1)
        with self._lock:
            self._reading[request] = 0
        if not self._threads.submit(1, self._serve, request, client_address):
            self._drop(request)

    def _serve(self, request, client_address):
        try:
            self.finish_request(request, client_address)
        except Exception:                   # 本文件的错;线程还要接着用
            logger.error('internal error in the server%s', _traceback())
        finally:
            self._drop(request)

    def _drop(self, request):
        self.done_reading(request)
        request.close()

    def close(self, deadline):
        """不再接受连接,关掉还在读的,等正在回答的;都完了返回 True。"""
        self.shutdown()
        self.server_close()
        self._evict(len(self._reading))
        return self._threads.close(deadline)


def _log_to_file(settings):
    """``[system] log_path``:日志写进那里,1 MiB 一个,一共三个。没写就不管日志。"""
    if not settings['log_path'] or logging is None or logger.handlers:
        return
    from logging.handlers import RotatingFileHandler
    path = os.path.join(settings['log_path'], settings['log_name'] or 'easywechat.log')
    try:
        handler = RotatingFileHandler(path, maxBytes=1 << 20, backupCount=2, encoding='utf-8')
    except OSError as e:
        raise ConfigError('cannot write log_path %s: %s' % (path, e.strerror)) from None
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    logger.addHandler(handler)


class WeChatServer(Dispatcher):
    """自带 HTTP 服务器的 `Dispatcher`:``run()``,或 ``start()`` 和 ``stop()``。

        server = WeChatServer('demo')
        server.register_callback('text', lambda msg: msg)
        server.run(port=8000)

    没有 TLS:那是反向代理的事。
    """

    #: 同时最多多少个还在读的连接(描述符上限的四分之一以内);满了就关最旧的。
    max_connections = 64
    #: 所有还没读完的正文,加起来最多多少字节。
    max_reading = 8 << 20
    #: 请求行、整个头部的上限,字节。
    max_line, max_head = 8 << 10, 16 << 10
    #: 读完头部、读完请求、写完回答的时限,秒;都是总数。
    head_within, request_within, write_within = 5, 10, 5
    #: 停下时等正在回答的,最多多少秒。
    stop_within = 5

    def __init__(self, appname='demo', ini_name=None, **settings):
        super().__init__(appname, ini_name, **settings)
        self._http = None
        self._thread = None

    def start(self, host='0.0.0.0', port=8000):
        """在后台线程里开始服务,返回真正的 ``(host, port)``;端口 0 由系统挑。

        ``host`` 也可以是 IPv6 的地址,``'::'`` 是两种都听。
        地址用不了抛 `OSError`,已经在服务抛 `RuntimeError`。
        """
        if self._http:
            raise RuntimeError('already started')
        _log_to_file(self.settings)
        self._http = _HTTPServer(self, host, port)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.2,), daemon=True)
        self._thread.start()
        return self._http.server_address[:2]

    def stop(self):
        """停止服务:不再接受,等正在回答的,最多 ``stop_within`` 秒。没在服务就什么也不做。"""
        server, self._http = self._http, None
        if server is None:
            return
        deadline = time.monotonic() + self.stop_within
        threads, self._threads = self._threads, _Threads(self.max_callbacks)
        if not (server.close(deadline) & threads.close(deadline)):
            logger.warning('stopped while callbacks were still running')
        self._thread.join(1)

    def run(self, host='0.0.0.0', port=8000, debug=False, threaded=True):
        """服务到 `stop()`、SIGTERM 或 Ctrl-C 为止;在任何线程里都行(信号只在主线程里接)。

        ``debug`` 见 `debug` 属性;``threaded`` 只为旧程序保留,总是多线程。
        """
        self.debug = bool(debug)
        host, port = self.start(host, port)
        print('EasyWeChat 在监听 http://%s:%d/%s ,后台填 http://<公网地址>:%d/%s 。按 Ctrl-C 停止。' % (
            '[%s]' % host if ':' in host else host, port, self.route, port, self.route),
            file=sys.stderr, flush=True)
        self._wait()

    def _wait(self):
        """等到停下。信号处理函数只抛 KeyboardInterrupt:在里面做别的会死锁。"""
        before = {}
        try:
            if threading.current_thread() is threading.main_thread():
                for number in signal.SIGTERM, signal.SIGINT:
                    before[number] = signal.signal(number, signal.default_int_handler)
            while self._http and self._thread.is_alive():
                self._thread.join(1)
        except KeyboardInterrupt:
            pass
        finally:
            for number in before:           # 再来一个也不打断:停下本来就有时限
                signal.signal(number, signal.SIG_IGN)
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)


# ---- 命令行 Command line ----------------------------------------------------------------------
# stdout 只有结果;出错是 stderr 上的一行 `easywechat: …`。
# 退出码:0 成了,1 被拒绝,2 用法或配置,3 网络,130 被打断。

#: 公开的演示凭据:没有 config.ini 时 --echo 和 --probe 用它,只在本机。
_DEMO = {'corpid': 'wwEasyWeChatDemo00', 'token': 'EasyWeChatDemo', 'agentid': '1000002',
         'encoding_aes_key': 'EasyWeChatDemoKeyIsPublicDoNotUseItAnywhere'}


class _CommandError(Exception):
    """命令行的一次失败:``args`` 是 (退出码, 一句话)。"""


def _echo(msg):
    """--echo 的回调:能原样返回的原样返回,别的列出字段。"""
    if msg.get('MsgType') in ('text', 'image', 'voice', 'video'):
        return msg
    return '\n'.join('%s: %s' % item for item in msg.items())


def _split_url(url):
    """→ `urlsplit` 的结果;不是 http(s) 的网址抛 `_CommandError`。"""
    try:
        parts = urllib.parse.urlsplit(url)
        if (parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0
                and re.fullmatch('[!-~]+', url)):
            return parts
    except ValueError:          # 端口、方括号
        pass
    raise _CommandError(2, 'not a URL that can be asked: %s (http://... or https://...)'
                        % _show(url))


def _ask(url, query, body=None):
    """像企业微信那样发一个请求,等 5 秒 → ``(状态, 正文 bytes)``。直连,不走代理,不跟随重定向。"""
    parts = _split_url(url)
    try:
        connect = getattr(http.client, parts.scheme.upper() + 'Connection')
        connection = connect(parts.hostname, parts.port, timeout=5)
        with contextlib.closing(connection):
            connection.request('GET' if body is None else 'POST', '%s?%s' % (
                parts.path or '/', urllib.parse.urlencode(query)), body,
                {'Content-Type': 'text/xml'} if body else {})
            response = connection.getresponse()
            return response.status, response.read(2 << 20)
    except socket.timeout:
        raise _CommandError(3, 'no answer from %s within 5 s' % parts.netloc) from None
    except http.client.HTTPException as e:
        raise _CommandError(3, '%s hung up: %r; is the callback slow?' % (parts.netloc, e)) from None
    except AttributeError:      # 没有 ssl 的 Python
        raise _CommandError(2, 'this Python has no ssl: install python3-openssl') from None
    except (OSError, ValueError) as e:
        raise _CommandError(3, 'cannot reach %s: %s' % (parts.netloc, e)) from None


def _signed(crypt, text):
    """→ (查询参数, 密文 str):像企业微信那样加密、签名。"""
    encrypt, timestamp = crypt.seal(text), str(int(time.time()))
    nonce = str(struct.unpack('>I', os.urandom(4))[0])
    return {'msg_signature': crypt.sign(timestamp, nonce, encrypt),
            'timestamp': timestamp, 'nonce': nonce}, encrypt.decode()


def _asked(url, query, body=None):
    status, answer = _ask(url, query, body)
    if status != 200:
        raise _CommandError(1, '%s answered %d%s' % (url, status, {
            403: ': Token, EncodingAESKey, corpid or the clock differ; its log says which',
            404: ': the path differs, see route_name'}.get(status, '')))
    return answer


def _probe(url, settings, text):
    """扮演企业微信:先 GET 校验,再投递一条文本 → (收到的消息 XML, 回复的 dict,没有回复是 {})。"""
    crypt = WXBizMsgCrypt(settings['token'], settings['encoding_aes_key'], settings['corpid'])
    echo = str(struct.unpack('>Q', os.urandom(8))[0])
    query, encrypt = _signed(crypt, echo)
    if _asked(url, dict(query, echostr=encrypt)) != echo.encode():
        raise _CommandError(1, '%s does not answer the echostr; is it EasyWeChat?' % url)
    message = dict_to_xml({
        'ToUserName': settings['corpid'], 'FromUserName': 'probe', 'CreateTime': int(time.time()),
        'MsgType': 'text', 'Content': text, 'AgentID': settings['agentid'],
        'MsgId': struct.unpack('>Q', os.urandom(8))[0] >> 1})
    query, encrypt = _signed(crypt, message)
    body = dict_to_xml({'ToUserName': settings['corpid'], 'Encrypt': encrypt,
                        'AgentID': settings['agentid']})
    answer = _asked(url, query, body.encode('utf-8'))
    if answer in (b'', b'success'):
        return message, {}
    try:
        envelope = xml_to_dict(answer)
        reply = crypt.decrypt_message(answer, envelope.get('MsgSignature'),
                                      envelope.get('TimeStamp'), envelope.get('Nonce'))
        return message, xml_to_dict(reply)
    except WeChatError as e:
        raise _CommandError(1, '%s answered what is no reply: %s' % (url, e.errmsg)) from None


def _settings_or_demo(args):
    """→ (关键字参数, 是不是演示):什么配置都没有,就用演示凭据。"""
    if not args.config and not os.environ.get('EASYWECHAT_CONFIG'):
        given = any(os.environ.get('EASYWECHAT_' + key.upper()) for key in _APP_KEYS)
        if not given and not any(os.path.isfile(p) for p in _config_paths(None)):
            return _DEMO, True
    return {}, False


def _loopback(host):
    return host == 'localhost' or host == '::1' or bool(re.fullmatch(r'127(\.[0-9]{1,3}){3}', host))


def _run_echo(args):
    settings, demo = _settings_or_demo(args)
    host = args.host or ('127.0.0.1' if demo else '0.0.0.0')
    if demo and not _loopback(host):
        raise _CommandError(2, 'without config.ini only this machine can be served; '
                            'python easywechat.py --init writes one')
    server = WeChatServer(args.app, args.config, **settings)
    server.register_callback('*', _echo)
    server.debug = args.debug
    try:
        host, port = server.start(host, args.port)
    except OSError as e:
        raise _CommandError(3, 'cannot listen on %s port %d: %s; --port takes another' % (
            host, args.port, e.strerror)) from None
    url = 'http://%s:%d/%s' % ('[%s]' % host if ':' in host else host, port, server.route)
    if demo:
        print('没有 config.ini:用公开的演示凭据 (easywechat._DEMO),只在本机。')
        message, reply = _probe(url, server.settings, '你好,EasyWeChat')
        print('▶ 发去 (加密前):%s\n◀ 收到 (解密后):%s' % (message, dict_to_xml(reply)))
        print("在另一个终端试试:python easywechat.py --probe '你好'%s" % (
            ' --url ' + url if port != 8000 else ''))
    else:
        print('后台「接收消息 → 设置API接收」的 URL:http://<公网地址>:%d/%s' % (port, server.route))
    print('在监听 %s ,按 Ctrl-C 停止。' % url, flush=True)
    server._wait()


def _run_probe(args):
    settings, demo = _settings_or_demo(args)
    app = Dispatcher(args.app, args.config, **settings)
    url = args.url or 'http://127.0.0.1:%d/%s' % (args.port, app.route)
    if demo and not _loopback(_split_url(url).hostname):
        raise _CommandError(2, 'without config.ini only this machine can be probed')
    text = args.probe
    if re.search('[\udc80-\udcff]', text):      # LANG=C:参数没有按 UTF-8 解码
        text = os.fsencode(text).decode('utf-8', 'replace')
    reply = _probe(url, app.settings, text)[1]
    if not reply:
        print('easywechat: (empty reply)', file=sys.stderr)
    elif reply.get('MsgType') == 'text':
        print(reply.get('Content', ''))
    else:
        print(dict_to_xml(reply))


def _run_init(args):
    import random
    choose = random.SystemRandom().choice
    letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
    path = os.path.abspath(args.config or 'config.ini')
    text = _CONFIG_TEMPLATE.format(corpid='', token=''.join(choose(letters) for _ in range(32)),
                                   encoding_aes_key=''.join(choose(letters) for _ in range(43)))
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as f:
            f.write(text.encode('utf-8'))
    except FileExistsError:
        raise _CommandError(2, '%s exists already, left as it is' % path) from None
    except OSError as e:
        raise _CommandError(2, 'cannot write %s: %s' % (path, e.strerror)) from None
    print(path)
    print('easywechat: 填上其中的 corpid,再把 Token 和 EncodingAESKey 抄到管理后台。', file=sys.stderr)


def _parser():
    import argparse
    parser = argparse.ArgumentParser(prog='easywechat.py', add_help=False,
                                     description='企业微信机器人,一个 Python 文件。')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--echo', action='store_true', help='启动一个原样回话的机器人')
    what.add_argument('--probe', metavar='TEXT', help='扮演企业微信:校验、投递 TEXT、打印回复')
    what.add_argument('--init', action='store_true',
                      help='写一个 config.ini,其中有新的 Token 和 EncodingAESKey')
    what.add_argument('--version', action='version', version=__version__, help='打印版本')
    what.add_argument('-h', '--help', action='help', help='打印这段说明')
    parser.add_argument('--host', help='监听的地址(默认 0.0.0.0;没有 config.ini 时 127.0.0.1)')
    parser.add_argument('--port', type=int, default=8000, help='端口(默认 8000)')
    parser.add_argument('--app', default='demo', help='config.ini 里的节名(默认 demo)')
    parser.add_argument('--config', metavar='FILE', help='config.ini 的路径')
    parser.add_argument('--url', help='--probe 的目标(默认本机)')
    parser.add_argument('--debug', action='store_true', help='回调出错时把原因回给用户')
    return parser


def main(argv=None):
    """命令行;返回退出码 (int)。"""
    args = _parser().parse_args(argv)
    try:
        if not 0 <= args.port <= 65535:
            raise _CommandError(2, 'no port: %d' % args.port)
        (_run_echo if args.echo else _run_init if args.init else _run_probe)(args)
        return 0
    except _CommandError as e:
        code, text = e.args
    except (WeChatError, ImportError) as e:
        code, text = (1 if isinstance(e, CryptoError) else 2), getattr(e, 'errmsg', e)
    except KeyboardInterrupt:
        code, text = 130, 'interrupted'
    print('easywechat: %s' % text, file=sys.stderr)
    return code


if __name__ == '__main__':
    sys.modules.setdefault('easywechat', sys.modules[__name__])
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    else:                           # Python 3.6
        sys.stdout = open(sys.stdout.fileno(), 'w', encoding=sys.stdout.encoding,
                          errors='backslashreplace', buffering=1, closefd=False)
    sys.exit(main())
