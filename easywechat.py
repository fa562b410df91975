#!/usr/bin/env python3
"""EasyWeChat:一个 Python 文件,把机器人接到企业微信 (WeCom)。

(与同名的 PHP SDK 无关。)把这个文件复制到自己的项目里,写一个函数,就有了会回话的机器人::

    import easywechat

    def reply_func(param_dict):             # 企业微信发来的消息,一个普通的 dict
        return param_dict                   # 原样返回;也可以返回 '一句话'

    server = easywechat.WeChatServer('demo')        # 读 config.ini 的 [demo]
    server.register_callback('text', reply_func)
    server.run(host='0.0.0.0', port=8000)

发一条消息更短,命令行上也行:``df -h | python easywechat.py --send -`` ::

    easywechat.WeChatClient('demo').send('磁盘 91%')

只用标准库;收消息另需 pycryptodome 里的 AES。没有账号也能先看一眼:``python easywechat.py --echo``。

从上往下读,每一节只用上面讲过的东西::

    错误 → XML → 加解密 → 配置 → 存储 → 消息 → 主动模式 → 回调模式 → 服务器 → 命令行

    企业微信 ──HTTP──▶ http.server 外壳 ┐                    ┌▶ 你的函数(dict) ─▶ str | dict | Path | …
    gunicorn ──WSGI──▶ server(environ,…)┼▶ Dispatcher.respond┤
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
import itertools
import json
import os
import re
import signal
import socket
import socketserver
import stat
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

__all__ = ['WeChatServer', 'WeChatClient', 'WeChatRobot', 'Dispatcher', 'WXBizMsgCrypt',
           'MemoryStore', 'FileStore', 'xml_to_dict', 'dict_to_xml', 'get_config', 'get_section',
           'ierror', 'WeChatError', 'CryptoError', 'FormatException', 'ConfigError', 'APIError',
           'NetworkError']


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


_CARDS = '照 path/90236 改;errmsg 说是哪个字段'

#: (错误码, 原因, 怎么办),管理后台的说法。README「出错了?」的表由它生成。
_CATALOGUE = (
    ((-1,), '企业微信系统繁忙', '已经试过几次;过一会儿再发'),
    ((40001,), 'Secret 不对', '到「应用管理 → 自建 → 应用」重新查看 Secret;要和 corpid 是同一个企业,应用没有停用'),
    ((40003,), 'UserID 不对', '用「通讯录 → 成员」里的「账号」,不是姓名'),
    ((40004, 40005), '媒体类型或文件类型不对', '图片 JPG、PNG,语音 AMR,视频 MP4,别的当作 file 发'),
    ((40006, 40009, 40011), '文件大小不对', '大于 5 字节;图片 10 MB、语音 2 MB、视频 10 MB、文件 20 MB 以内'),
    ((40007,), 'media_id 不对或过期', '三天有效,只在上传它的企业里能用:再上传一次'),
    ((40008,), 'msgtype 不对', '类型见 README 的「主动模式」;markdown_v2 只有群机器人能发'),
    ((40013,), '企业ID 不对', '「我的企业 → 企业信息」最下面,ww 开头,18 个字符'),
    ((40014, 42001), 'access_token 不对或过期', '已经换过一次新的;看 secret 和 agentid 是不是同一个应用的'),
    (range(40016, 40028), '菜单不对', '一级 1–3 个,二级 1–5 个;名字 16 / 40 字节,key 128 字节,url 1024 字节以内'),
    ((40029, 42003, 42022), '授权码用过或过期了', '一个 code 只能用一次,五分钟有效:重新授权'),
    ((40031, 40032), '成员名单不对或太长', '用 | 隔开,一次最多 1000 个'),
    ((40033,), '含有不允许的字符', '正文要是 UTF-8,不要 \\uXXXX 的转义'),
    ((40035, 40058, 40063), '参数不对', 'errmsg 里有字段的名字;照 path/90236 改'),
    ((40039, 40094, 45034), '网址太长,或没有 http://', '1024 字节以内,写全 http:// 或 https://'),
    ((40050, 86001, 86003, 86008), '群不对', 'chatid 要由这个应用用 appchat/create 建'),
    ((40054, 40055), '菜单的网址不对', '要有 http://,域名在应用的可信域名里'),
    ((40056,), 'AgentId 不对', '「应用管理 → 自建 → 应用」最上面的数字'),
    ((40057,), '回调 URL 不通', '先让程序跑起来再按「保存」;python easywechat.py --probe 能从外面试'),
    ((40066, 40068, 40070, 60003, 60123), '部门或标签不对', '用「通讯录」里的部门 ID、标签 ID(数字)'),
    ((40074,), '图文不能保密', '去掉 safe,或用 mpnews'),
    ((40091,), 'Secret 是别的企业的', 'corpid 和 secret 要从同一个企业的后台抄'),
    ((40123,), '图片坏了', '重新生成 JPG 或 PNG'),
    ((40201, 82004), '内容被拦下了', '换一种写法'),
    ((41001,), '没有 access_token', '中转 (api_base) 丢了查询串:让它原样转发'),
    ((41002, 41004), '没有 corpid 或 secret', '写进 config.ini;若已写了,是中转 (api_base) 丢了查询串'),
    ((41006, 41009, 41011, 41016, 41033), '少了字段', 'errmsg 里有名字;agentid 在 config.ini 里写'),
    ((*range(42014, 42022), *range(42023, 42052)), '模板卡片不对', _CARDS),
    ((43004,), '成员没有绑定微信插件', '「我的企业 → 微信插件」扫码'),
    ((43009,), '企业没有认证', '「我的企业 → 企业信息」里认证'),
    ((43012,), '应用没有回调 URL', '按钮、投票的卡片要先「设置API接收」'),
    ((44001, 44004), '文件或正文是空的', '文件要大于 5 个字节,正文至少一个字'),
    ((45001,), '文件太大', '图片 10 MB、语音 2 MB、视频 10 MB、文件 20 MB 以内'),
    ((45002,), '正文太长', 'text 和 markdown 2048 字节以内(群机器人的 markdown 4096)'),
    ((45007, 45008, 45032), '语音、图文或作者超长', '语音 60 秒,图文 8 条,作者 64 字节以内'),
    ((45009, 45033), '发得太多、太快', '按分钟的限制等 60 秒,按小时的等一小时,按天的等到次日零点;群机器人每分钟 20 条'),
    ((45024, 45029), '超过账号数,或回答太大', '缩小范围,分几次'),
    ((45031,), 'Secret 不够安全', '「应用管理 → 自建 → 应用」里重置 Secret'),
    ((46003,), '还没有菜单', '先用 menu/create 建'),
    ((46004, 60111), '没有这个成员', '用「通讯录 → 成员」里的「账号」'),
    ((48001, 48002, 48004, 48005), '没有权限用这个 API', '看这个 API 的「权限说明」:应用的类型、可见范围'),
    ((48006,), '应用太久没用,权限收回了', '管理员到「应用管理 → 自建 → 应用」重新启用'),
    ((48009,), '通讯录同步不让新 IP 读', '改用自建应用的 Secret'),
    ((49008,), '群解散了', '另建一个群'),
    ((50001, 80001, 85004, 85005, 85008, 85111), '可信域名不对', '「应用 → 网页授权及JS-SDK」里一字不差,已备案'),
    ((50002, 60011, 60021), '不在可见范围里', '「应用管理 → 自建 → 应用 → 可见范围」里加上'),
    ((50003,), '应用停用了', '「应用管理 → 自建 → 应用」里启用'),
    ((60020,), '出口 IP 不可信',
     '把 {ip} 加到「应用管理 → 自建 → 应用 → 企业可信IP」,约一分钟生效;没有固定 IP 就用中转 (api_base) 或群机器人'),
    ((60140,), 'response_code 用过或过期了', '一个只能用一次:等下一次点击'),
    ((81012, 82001), '没有写收件人', '给 to、party 或 tag,或在 config.ini 里写 touser'),
    ((81013,), '收件人都不对,或都不在可见范围里', '「账号」写对;「应用管理 → 自建 → 应用 → 可见范围」里加上他'),
    ((82002, 82003), '部门或标签太多', '一次最多 100 个'),
    ((86004, 86005, 86006, 86007, 86215, 86220), '建群的参数不对', '2 到 2000 个成员,群主在内,chatid 没有用过'),
    (range(90200, 90209), '小程序通知不对', '小程序要绑定到应用;字段的长度见 path/90236'),
    ((93000,), '群机器人的 key 不对,或机器人已移除', '在群里重新添加,抄新的 Webhook 地址'),
    ((93004, 93005, 93008), '群机器人停用了,或不在群里', '在群里重新启用、添加'),
    ((301002,), 'agentid 和 secret 不是同一个应用的', '「应用管理 → 自建 → 应用」里两样一起抄'),
    ((301019,), '图片的 md5 不对', '让 WeChatRobot 来算:send(Path(...))'),
    ((830001, 830002, 830003), '从网址上传失败', '对方的服务器要支持 Range,200 MB 以内'),
)


def _advice(errcode, errmsg=''):
    """(原因, 怎么办);目录里没有的是两个空的 str。"""
    for codes, cause, advice in _CATALOGUE:
        if errcode in codes:
            ip = re.search('from ip: ?([0-9a-fA-F.:]+)', errmsg)
            return cause, '%s:%s' % (cause, advice.replace('{ip}', ip.group(1) if ip else '出口 IP'))
    return '', ''


class APIError(WeChatError):
    """企业微信拒绝了一次调用。

    ``errcode`` 和 ``errmsg`` 是它的原话(path/90313),``path`` (str) 是 API,例如 'message/send',
    ``hint`` (str) 是该怎么办。``str()`` 是英文的原话,一个破折号,怎么办。
    """

    def __init__(self, errcode, errmsg, path='', hint=None):
        super().__init__(errcode, errmsg)
        self.path = path
        self.hint = _advice(errcode, errmsg)[1] if hint is None else hint

    def __str__(self):
        text = '%s: %s (%d)' % (self.path, self.errmsg, self.errcode)
        return text + ' — ' + self.hint if self.hint else text


class NetworkError(APIError):
    """没有得到企业微信的回答。``errcode``:503 没有连上,504 没有完整的回答,502 回答的不是企业微信。

    ``maybe_sent`` 为真时请求可能已经到了,重发可能成了两条。
    """

    def __init__(self, errcode, errmsg, path='', hint='', maybe_sent=False):
        super().__init__(errcode, errmsg + '; it may have been delivered' * maybe_sent, path, hint)
        self.maybe_sent = maybe_sent


_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]')


def _show(value, limit=200):
    """外来的文字进日志以前:截短,控制字符写成转义,伪造不了日志行,也动不了终端。"""
    text = str(value)
    if limit and len(text) > limit:
        text = text[:limit] + '...'
    return _UNPRINTABLE.sub(lambda m: '\\u%04x' % ord(m.group()), text)


_SECRET = re.compile(r'((?:access_token|corpsecret|secret|key)=)[^&\s"\'<>]+')
#: 用过的密钥和 token,最近的一百个:从错误和日志里抹掉。
_secrets = collections.deque(maxlen=100)


def _redact(text):
    """去掉网址里的密钥,和每一个用过的密钥。"""
    for secret in set(_secrets):
        text = text.replace(secret, '***')
    return _SECRET.sub(r'\1***', text)


def _decoded(text):
    """命令行参数或文件名;LANG=C 时没有按 UTF-8 解码的,在这里解码。"""
    if re.search('[\udc80-\udcff]', text):
        text = os.fsencode(text).decode('utf-8', 'replace')
    return text


def _traceback():
    """当前异常的 traceback,每行缩进、转义:里面可能有用户发来的字。"""
    import traceback
    return ''.join('\n    ' + _show(line, None) for line in _redact(traceback.format_exc()).splitlines())


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


def _xml_chars(text):
    """去掉 XML 1.0 不许的字符。它们都不可打印,所以多数文字看一眼就过了,不用正则。"""
    return text if text.isprintable() else _NOT_XML.sub('', text)


class _DictBuilder:
    """`ET.XMLParser` 的 target:一边解析一边生成 dict,超过限制就停。"""

    def __init__(self):
        self._open = []         # 外层到内层,各是它的 dict;没有子元素的是空的
        self._text = []
        self._count = 0
        self._root = None
        self.data = self._text.append       # data(text),expat 每读到一段文字

    def start(self, tag, attributes):
        self._count += 1
        if self._count > _XML_ELEMENTS or len(self._open) >= _XML_DEPTH:
            raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error, 'XML has more than %d '
                                  'elements or %d levels' % (_XML_ELEMENTS, _XML_DEPTH))
        self._open.append({})
        self._text.clear()                  # 子元素之间的空白只是排版

    def end(self, tag):
        value = self._open.pop() or ''.join(self._text)
        self._text.clear()
        siblings = self._open[-1] if self._open else None
        if siblings is None:
            self._root = value
        elif tag not in siblings:
            siblings[tag] = value
        elif isinstance(siblings[tag], list):
            siblings[tag].append(value)
        else:
            siblings[tag] = [siblings[tag], value]

    def close(self):
        return self._root if isinstance(self._root, dict) else {}


def _parse_xml(text):
    """解析一次;不以根元素开头的抛 `ValueError`。"""
    text = text.lstrip('\ufeff \t\r\n')
    if not _BEGINS_WITH_ROOT.match(text):
        raise ValueError('does not begin with its root element')
    parser = ET.XMLParser(target=_DictBuilder(), encoding='utf-8')
    parser.feed(text.encode('utf-8'))
    return parser.close()


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
        try:
            return _parse_xml(text)
        except (ET.ParseError, ValueError):     # 也许只是有 XML 1.0 不许的字符:expat 遇到就停
            cleaned = _NOT_XML.sub('', text)
            if cleaned == text:
                raise
        return _parse_xml(cleaned)
    except (ET.ParseError, ValueError, LookupError, RecursionError, MemoryError) as e:
        raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error,
                              'cannot read XML: %s' % _show(e)) from None


@functools.lru_cache(maxsize=500)       # 来来去去就那几个名字
def _check_name(name):
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error,
                              'not a name for an XML element: %s' % _show(repr(name)))


def _write_element(name, value, depth):
    _check_name(name)
    if isinstance(value, str):
        text = _xml_chars(value).replace(']]>', ']]]]><![CDATA[>')
        return '<%s><![CDATA[%s]]></%s>' % (name, text, name)
    if isinstance(value, (list, tuple)) and depth <= _XML_DEPTH:
        return ''.join([_write_element(name, item, depth + 1) for item in value])
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
_BASE64 = b'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'


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
        key, aes = binascii.a2b_base64(sEncodingAESKey + '='), _aes()
        self._token = sToken.encode('utf-8')
        self._receive_id = sCorpId.encode('utf-8')
        # CBC 的 IV 只影响第一块,而第一块正是没有人看的 random(16):所以每个方向一个对象,一条接一条用下去。
        # 新建一个要 6 µs,一来一回两个,是整个编解码的四分之一。
        self._encryptor = aes.new(key, aes.MODE_CBC, key[:16])
        self._decryptor = aes.new(key, aes.MODE_CBC, key[:16])
        self._lock = threading.Lock()       # 用这两个对象时拿着

    def _signature(self, timestamp, nonce, encrypt):
        parts = sorted([self._token, timestamp.encode(), nonce.encode(), encrypt])
        return hashlib.sha1(b''.join(parts)).hexdigest()

    def sign(self, timestamp, nonce, encrypt):
        """密文 (bytes) 的签名,40 个小写十六进制字符 (str)。"""
        if not _TIMESTAMP.fullmatch(timestamp) or not _NONCE.fullmatch(nonce):
            raise CryptoError(ierror.WXBizMsgCrypt_ComputeSignature_Error)
        return self._signature(timestamp, nonce, encrypt)

    def verify(self, msg_signature, timestamp, nonce, encrypt):
        """签名或某一段的格式不对就抛 `CryptoError`;密文 (bytes) 在这以前不必可信。"""
        for name, value, form in (('msg_signature', msg_signature, _SIGNATURE),
                                  ('timestamp', timestamp, _TIMESTAMP), ('nonce', nonce, _NONCE)):
            if not value or not form.fullmatch(str(value)):
                raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, '%s is %s' % (
                    name, 'malformed: ' + _show(value) if value else 'missing in the query'))
        data = encrypt.rstrip(b'=')
        padding = len(encrypt) - len(data)
        if not data or data.translate(None, _BASE64) or padding > 2 or len(encrypt) % 4:
            raise CryptoError(ierror.WXBizMsgCrypt_DecodeBase64_Error)
        expected = self._signature(str(timestamp), nonce, encrypt)
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
        with self._lock:
            data = self._decryptor.decrypt(data)
        data = _unpad(data[16:])
        end = 4 + struct.unpack('>I', data[:4])[0] if len(data) >= 4 else -1
        if not 4 <= end <= len(data):
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer)
        if not hmac.compare_digest(data[end:], self._receive_id):
            theirs, ours = (_mask(i.decode('utf-8', 'replace'))
                            for i in (data[end:], self._receive_id))
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateCorpid_Error, 'receive id differs: '
                              'got %s, corpid here is %s' % (_show(theirs), ours))
        try:
            return data[4:end].decode('utf-8')
        except UnicodeDecodeError:
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, 'not UTF-8') from None

    def seal(self, message):
        """明文 (str 或 UTF-8 的 bytes) → 密文 (base64, bytes)。"""
        try:
            data = message.encode('utf-8') if isinstance(message, str) else bytes(memoryview(message))
        except (UnicodeEncodeError, TypeError):
            raise CryptoError(ierror.WXBizMsgCrypt_EncryptAES_Error) from None
        data = os.urandom(16) + struct.pack('>I', len(data)) + data + self._receive_id
        data = _pad(data)
        with self._lock:
            data = self._encryptor.encrypt(data)
        return binascii.b2a_base64(data, newline=False)

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
        # 密文是 base64,签名是十六进制,timestamp 由 sign 验过是十位数字:不用转义
        return ('<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature>'
                '<TimeStamp>%s</TimeStamp>%s</xml>' % (
                    encrypt.decode(), self.sign(timestamp, nonce, encrypt), timestamp,
                    _write_element('Nonce', nonce, 1)))

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
             'robot', 'api_base', 'ca_file')
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
# AgentId 和 Secret,主动发送才要:「应用管理 → 自建 → 你的应用」最上面
agentid =
secret =
# 不写收件人时发给谁:「通讯录 → 成员」里的「账号」,几个用 | 隔开,@all 是可见范围里的所有人
touser =
# 群机器人 Webhook 地址里 key= 后面的,--robot 才要:「群 → 消息推送 → 添加」
robot =
# 家里没有固定 IP 时的中转,例如 https://vps.example.com;不写就直连
api_base =
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
    """一个应用的设置;``repr`` 只有键名,不会把密钥带进日志。``sources``:键 → 从哪里来。"""

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


def _sources(appname, path, settings):
    """→ [(从哪里来, {键: 值})],前面的优先:文件的两节、环境变量。"""
    keys = _APP_KEYS + _SYSTEM_KEYS
    sources = [('environment', {k: os.environ.get('EASYWECHAT_' + k.upper(), '') for k in keys})]
    if path:
        ini = _read_ini(path)
        if not ini.has_section(appname) and not settings:
            raise ConfigError('no [%s] in %s; it has: %s' % (
                appname, path, ', '.join('[%s]' % _show(s) for s in ini.sections())))
        for section, keys in (appname, _APP_KEYS), ('system', _SYSTEM_KEYS):
            if ini.has_section(section):
                sources.insert(0, ('%s [%s]' % (path, section),
                                   {k: ini.get(section, k, fallback='') for k in keys}))
    return sources


def get_config(appname, ini_name=None, **settings):
    """应用 ``appname`` 的设置,一个 dict;没写的键是 ``''``,``agentid`` 与 ``appid`` 相同。

    依次找 ``ini_name``,否则环境变量 ``EASYWECHAT_CONFIG``,否则脚本的目录、当前目录、本文件的目录里的
    config.ini。环境变量 ``EASYWECHAT_CORPID`` 等补上没写的;关键字参数盖过其余的,None 是没给。
    找不到、读不懂、没有这一节,抛 `ConfigError`,其中有试过的每个路径。``appname`` 是上一次的结果,就照用。
    """
    if isinstance(appname, _Settings):
        return appname
    unknown = set(settings) - set(_APP_KEYS + _SYSTEM_KEYS)
    if unknown:
        raise TypeError('no such setting: %s' % ', '.join(sorted(unknown)))
    paths = _config_paths(ini_name)
    path = next((p for p in paths if os.path.isfile(p)), None)
    given = {k: str(v) for k, v in settings.items() if v is not None}
    values = _Settings.fromkeys(_APP_KEYS + _SYSTEM_KEYS, '')
    values.sources = {}
    for source, found in _sources(appname, path, settings) + [('keyword', given)]:
        for key, value in found.items():
            if source == 'keyword' or not values[key]:
                values[key], values.sources[key] = _clean(value), source
    if not path and (ini_name or not any(values[k] for k in _APP_KEYS)):
        raise ConfigError('no configuration found; tried: %s' % ', '.join(paths))
    for key, other in ('agentid', 'appid'), ('appid', 'agentid'):
        if not values[key]:
            values[key], values.sources[key] = values[other], values.sources.get(other)
    _secrets.extend(values[k] for k in ('secret', 'token', 'encoding_aes_key', 'robot')
                    if len(values[k]) > 5)
    return values


def get_section(name, ini_name=None):
    """同一个 config.ini 里别的一节,例如自己的程序的阈值 → dict,值是 str;没有文件、没有这一节是 ``{}``。"""
    path = next((p for p in _config_paths(ini_name) if os.path.isfile(p)), None)
    ini = _read_ini(path) if path else configparser.ConfigParser()
    return {k: _clean(v) for k, v in ini.items(name)} if ini.has_section(name) else {}


# ---- 存储 Store -------------------------------------------------------------------------------
# 认领过的消息和 access_token 放在这里,接口是 redis-py 的三个方法:get、set(ex=, nx=)、delete。

class MemoryStore:
    """进程内的存储,按条数和字节数封顶,最旧的先出去。任何线程都可以用。"""

    #: 最多多少条;名字和值一共最多多少字节。
    max_entries, max_bytes = 10000, 4 << 20

    _clock = staticmethod(time.monotonic)

    def __init__(self):
        self._lock = threading.Lock()
        # 十六页 {名字: (到期的时刻, 值)},旧的在前,满了丢掉最旧的一页。一个大 dict 隔一阵就要搬一次家,
        # 每次在不同的线程里,malloc 的碎片会有十几 MB。
        self._pages = collections.deque([{}], 16)
        self._bytes = 0                 # 最新一页的

    def _page_of(self, name):
        """``name`` 在哪一页;没有或到期了是 None。"""
        for page in reversed(self._pages):
            if name in page:
                if page[name][0] > self._clock():
                    return page
                del page[name]
        return None

    def get(self, name):
        """``name`` (str) 的值 (bytes);没有或到期了是 None。"""
        with self._lock:
            page = self._page_of(name)
            return page and page[name][1]

    def set(self, name, value, ex=None, nx=False):
        """记下 ``value`` (bytes),``ex`` 秒后到期;``nx`` 为真时只在没有的时候记。记了返回 True,否则 None。"""
        with self._lock:
            page = self._page_of(name)
            if page:
                if nx:
                    return None
                del page[name]
            page = self._pages[-1]
            page[name] = self._clock() + ex if ex else float('inf'), value
            self._bytes += len(name) + len(value)
            if 16 * len(page) >= self.max_entries or 16 * self._bytes >= self.max_bytes:
                self._pages.append({})
                self._bytes = 0
            return True

    def delete(self, name):
        """删掉 ``name``;返回删了几条 (int)。"""
        with self._lock:
            page = self._page_of(name)
            if page:
                del page[name]
            return int(page is not None)


def _cache_folders():
    """放 token 的目录,依次试。"""
    home = os.path.expanduser('~')
    cache = os.environ.get('XDG_CACHE_HOME') or (home != '~' and os.path.join(home, '.cache'))
    if cache:
        yield os.path.join(cache, 'easywechat')
    import tempfile
    user = str(os.getuid()) if os.name == 'posix' else os.environ.get('USERNAME', '')
    yield os.path.join(tempfile.gettempdir(), 'easywechat-' + user)


class FileStore:
    """磁盘上的存储,这台机器的各个进程共用:目录 0700,文件 0600,一条一个文件,写是原子的。

    ``folder`` 默认是 ``$XDG_CACHE_HOME/easywechat``、``~/.cache/easywechat`` 或 ``<tmp>/easywechat-<uid>``。
    文件名是名字的散列。不是自己的、别人能读的文件当作没有;写不了磁盘抛 `OSError`。
    """

    _now = staticmethod(time.time)

    def __init__(self, folder=None):
        self._folders = [folder] if folder else None
        self._folder = None             # 第一次用到才建
        self._swept = 0
        self._memory_lock = threading.Lock()

    def _choose(self):
        """第一个可用的目录;都不行抛 `OSError`。"""
        for folder in self._folders or _cache_folders():
            try:
                os.makedirs(folder, 0o700, exist_ok=True)
                found = os.lstat(folder)
                if os.name == 'posix' and (not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022
                                           or found.st_uid != os.geteuid()):
                    raise OSError(errno.EPERM, 'not a folder that only we can write', folder)
                if not os.access(folder, os.W_OK):
                    raise OSError(errno.EACCES, 'not writable', folder)
                return folder
            except OSError as e:
                failure = e
        raise failure

    def _path(self, name, form='%s'):
        """``name`` 的文件。"""
        self._folder = self._folder or self._choose()
        return os.path.join(self._folder, form % hashlib.sha1(name.encode('utf-8')).hexdigest())

    def _read(self, path):
        """文件里的值 (bytes);没有、过期、不可信是 None。"""
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0))
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ELOOP):      # ELOOP:别人放的符号链接
                return None
            raise
        with open(fd, 'rb') as f:
            found = os.fstat(fd)
            if os.name == 'posix' and (found.st_uid != os.geteuid() or found.st_mode & 0o077
                                       or not stat.S_ISREG(found.st_mode)):
                logger.warning('%s ignored: not a file that only we can read', path)
                return None
            head, _, value = f.read(1 << 20).partition(b'\n')
        match = re.fullmatch(b'([0-9]{1,15}) ([0-9]{1,15}) ([0-9]{1,9})', head)
        if not match or len(value) != int(match.group(3)):
            return None
        written, ends = int(match.group(1)), int(match.group(2))
        # 时钟往回跳过的,也当作过期:不知道真正过了多久
        return value if written - 60000 <= self._now() * 1000 < ends else None

    def _write(self, path, value, ex):
        now = int(self._now() * 1000)
        temporary = '%s.%d.%d.tmp' % (path, os.getpid(), threading.get_ident())
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as f:
                f.write(b'%d %d %d\n' % (now, now + ex * 1000 if ex else 10 ** 14, len(value)) + value)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _sweep(self):
        """每分钟至多一次:删掉过期的,和写到一半的进程留下的。"""
        now = self._now()
        if abs(now - self._swept) < 60:
            return
        self._swept = now
        for entry in os.listdir(self._folder):
            path = os.path.join(self._folder, entry)
            with contextlib.suppress(OSError):
                ours = re.fullmatch(r'[0-9a-f]{40}(\.[0-9]+\.[0-9]+\.tmp)?', entry)
                if not ours or abs(now - os.stat(path).st_mtime) < 60:
                    continue
                if entry.endswith('.tmp') or self._read(path) is None:
                    os.unlink(path)

    def _open_lock(self, name, kind):
        """锁文件(一种十六个,从不删除)的描述符;不能用文件锁是 None。"""
        with contextlib.suppress(ImportError, OSError):
            import fcntl        # noqa: F401
            return os.open(self._path(name, kind + '-%.1s'),
                           os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o600)

    @contextlib.contextmanager
    def lock(self, name, within=20, kind='lock'):
        """同一时刻这台机器上只有一个在里面;``within`` 秒还轮不到就不等了。没有 flock 时只管本进程。"""
        fd = self._open_lock(name, kind)
        if fd is None:
            with self._memory_lock:
                yield
            return
        import fcntl
        deadline = time.monotonic() + within
        try:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
                except OSError:         # 网络文件系统不会锁
                    break
            yield
        finally:
            os.close(fd)

    def get(self, name):
        """``name`` (str) 的值 (bytes);没有或到期了是 None。"""
        return self._read(self._path(name))

    def set(self, name, value, ex=None, nx=False):
        """同 `MemoryStore.set`。"""
        path = self._path(name)
        self._sweep()
        with self.lock(name) if nx else contextlib.ExitStack():
            if nx and self._read(path) is not None:
                return None
            self._write(path, value, ex)
            return True

    def delete(self, name):
        """删掉 ``name``;返回删了几条 (int)。"""
        path = self._path(name)
        found = self._read(path) is not None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return int(found)


class _Shared:
    """会坏的存储,例如 `redis.Redis`、`FileStore`:坏了就用内存,说一次,过几秒再试它。"""

    #: 坏了以后多少秒再试。
    retry_after = 5

    def __init__(self, store):
        self._store = store
        self._memory = MemoryStore()    # 坏了的时候记下的,好了以后也还算数
        self._until = 0

    def _try(self, method, *args, **kwargs):
        """→ (成没成, 结果)。"""
        if time.monotonic() < self._until:
            return False, None
        try:
            result = getattr(self._store, method)(*args, **kwargs)
        except Exception as e:          # 别人的代码,什么都可能抛
            if not self._until:
                logger.error('the store failed, going on in memory: %s: %s', type(e).__name__,
                             _show(e))
            self._until = time.monotonic() + self.retry_after
            return False, None
        if self._until:
            self._until = 0
            logger.warning('the store works again')
        return True, result

    def get(self, name):
        """同 `MemoryStore.get`。"""
        value = self._memory.get(name) or self._try('get', name)[1]
        return value.encode('utf-8') if isinstance(value, str) else value

    def set(self, name, value, ex=None, nx=False):
        """同 `MemoryStore.set`。"""
        if nx and self._memory.get(name):
            return None
        done, result = self._try('set', name, value, ex=ex and int(-(-ex // 1)), nx=nx)
        if not done:
            return self._memory.set(name, value, ex, nx)
        self._memory.delete(name)
        return result

    def delete(self, name):
        """同 `MemoryStore.delete`。"""
        return self._memory.delete(name) + (self._try('delete', name)[1] or 0)


def _steady(store):
    """``store``,坏了也不要紧的。"""
    return store if isinstance(store, (MemoryStore, _Shared)) else _Shared(store)


# ---- 消息 Messages ----------------------------------------------------------------------------
# 回调和 send() 给的东西:先展开成一条一条 (_items),再写成被动回复的字段 (_build_reply,path/90241)
# 或主动发送的 JSON (_build_message,path/90236)。

#: MsgType → 它自己的字段;别的字段(比如原样返回的 MsgId)不发出去。
_REPLY_FIELDS = {
    'text': ('Content',), 'image': ('Image',), 'voice': ('Voice',), 'video': ('Video',),
    'news': ('ArticleCount', 'Articles'), 'update_button': ('Button',),
    'update_template_card': ('TemplateCard',), 'update_taskcard': ('TaskCard',),
}
#: 这些类型的正文最多多少字节;更长的分成几条。群机器人的 markdown 可以长一倍。
_TEXT_LIMITS = {'text': 2048, 'markdown': 2048}
_ROBOT_LIMITS = {'text': 2048, 'markdown': 4096, 'markdown_v2': 4096}

_PARAGRAPH, _LINE = re.compile(r'\n\s*\n'), re.compile('\n')
_SENTENCE = re.compile('[。!?!?;;…]+|[.] |[,,、 ]')


def _split_text(text, limit=2048):
    """长文本 → 一段一段的 (生成器),每段至多 ``limit`` 字节,段首尾的空行去掉。

    依次在段落、行、句子之间分,找不到才在字与字之间;太靠前的断点不用,免得分得太碎。
    """
    text, begin = _xml_chars(text), 0
    if text and len(text.encode('utf-8')) <= limit:
        yield text
        return
    while begin < len(text):
        piece = text[begin:begin + limit].encode('utf-8')[:limit].decode('utf-8', 'ignore')
        if begin + len(piece) < len(text):
            for separator in _PARAGRAPH, _LINE, _SENTENCE:
                ends = [m.end() for m in separator.finditer(piece, len(piece) // 2)]
                if ends:
                    piece = piece[:ends[-1]]
                    break
        begin += len(piece)
        if piece.strip():
            yield piece.strip('\r\n')


def _items(result, limits=_TEXT_LIMITS):
    """回调的返回值或 send() 的参数 → 一条一条的消息 (生成器):展开 list、tuple、生成器,分开长文本。"""
    if isinstance(result, str):
        yield from _split_text(result)
    elif isinstance(result, dict):
        kind = result.get('msgtype')
        body = result.get(kind) if kind in limits else None
        if isinstance(body, dict) and isinstance(body.get('content'), str):
            for part in _split_text(body['content'], limits[kind]):
                yield dict(result, **{kind: dict(body, content=part)})
        elif isinstance(result.get('Content'), str) and result.get('MsgType', 'text') == 'text':
            for part in _split_text(result['Content']):
                yield dict(result, Content=part)
        else:
            yield result
    elif isinstance(result, (list, tuple)) or hasattr(result, '__next__'):
        for item in result:
            yield from _items(item, limits)
    elif isinstance(result, os.PathLike):
        yield result
    elif result is not None:
        raise TypeError('expected str, dict, Path or a list of these, got %s'
                        % type(result).__name__)


def _reply_fields(msg_type, result):
    """``result`` 里属于 ``msg_type`` 的字段;平放的 MediaId 包好,Articles 可以是 list。"""
    fields = {name: result[name] for name in _REPLY_FIELDS[msg_type] if name in result}
    name = _REPLY_FIELDS[msg_type][-1]
    if name not in fields and 'MediaId' in result and msg_type in ('image', 'voice', 'video'):
        fields[name] = {k: result[k] for k in ('MediaId', 'Title', 'Description') if k in result}
    if name not in fields:
        raise TypeError('a reply of type %s needs %s' % (msg_type, name))
    if msg_type == 'text':
        fields['Content'] = str(fields['Content'])
    if msg_type == 'news':
        articles = fields['Articles']
        items = articles.get('item') if isinstance(articles, dict) else articles
        items = [items] if isinstance(items, dict) else items
        if not isinstance(items, (list, tuple)) or not 1 <= len(items) <= 8:
            raise TypeError('Articles must be a list of 1 to 8 dicts')
        fields = {'ArticleCount': len(items), 'Articles': {'item': items}}
    return fields


def _reply_type(result, default):
    """``result`` 的 MsgType;没写的看它有哪个字段,再没有就是 ``default``。"""
    msg_type = result.get('MsgType') or next(
        (kind for kind, names in _REPLY_FIELDS.items() if names[-1] in result), default)
    if msg_type not in _REPLY_FIELDS:
        raise TypeError('%s is no type of passive reply; these are: %s' % (
            _show(repr(msg_type)), ', '.join(_REPLY_FIELDS)))
    return msg_type


def _build_reply(item, msg_type, user, corp, now):
    """一条消息 (str 或 dict) → 完整的被动回复 dict。写不成的抛 `TypeError`。"""
    if isinstance(item, str):
        item = {'MsgType': 'text', 'Content': item}
    msg_type = _reply_type(item, msg_type)
    reply = {'ToUserName': user, 'FromUserName': corp, 'CreateTime': int(now), 'MsgType': msg_type}
    reply.update(_reply_fields(msg_type, item))
    return reply


def _build_message(item, msg_type=None):
    """一条消息 (str、官方的 JSON dict,或被动回复的 dict) → 官方的 JSON dict,还没有收件人。"""
    if isinstance(item, str):
        return {'msgtype': 'text', 'text': {'content': item}}
    if 'msgtype' in item:
        return dict(item)
    kind = _reply_type(item, msg_type)
    fields = _reply_fields(kind, item)
    if kind == 'text':
        return {'msgtype': kind, kind: {'content': fields['Content']}}
    if kind == 'news':
        articles = [{k.lower(): v for k, v in a.items()} for a in fields['Articles']['item']]
        return {'msgtype': kind, kind: {'articles': articles}}
    if kind in ('image', 'voice', 'video'):
        media = fields[_REPLY_FIELDS[kind][0]]
        names = {'MediaId': 'media_id', 'Title': 'title', 'Description': 'description'}
        return {'msgtype': kind, kind: {names[k]: v for k, v in media.items() if k in names}}
    raise TypeError('%s can only be a passive reply' % kind)


def _official_case(value):
    """XML 的 CamelCase 名字 → JSON 的 snake_case,连同里面的。"""
    if isinstance(value, dict):
        names = ((re.sub('(?<!^)(?=[A-Z])', '_', k).lower(), v) for k, v in value.items())
        return {re.sub('^(key)_(?=name)|^(app|user)_(?=id)|^(page)_(?=path)', r'\1\2\3', k):
                _official_case(v) for k, v in names}
    return [_official_case(v) for v in value] if isinstance(value, (list, tuple)) else value


def _build_card_update(item, user, response_code):
    """``update_button``、``update_template_card`` 的回复 → 更新卡片的 JSON(path/94888);别的是 None。"""
    name = {'Button': 'button', 'TemplateCard': 'template_card'}
    found = [k for k in name if isinstance(item, dict) and k in item and 'msgtype' not in item]
    return {'userids': [user], 'response_code': response_code,
            name[found[0]]: _official_case(item[found[0]])} if found else None


# ---- 主动模式 Client --------------------------------------------------------------------------
# 每个请求都从 _Caller._request 出去:时限是总数,只重试肯定没到的;消息绝不因为重试变成两条。
# POST https://qyapi.weixin.qq.com/cgi-bin/message/send?access_token=…  {"touser": …, "msgtype": …}
# 回答 {"errcode": 0, "errmsg": "ok", …}(path/90313);token 见 path/91039,素材见 path/90253。

_API_BASE = 'https://qyapi.weixin.qq.com'

#: 类型 → (最多多少字节, 后缀)。
_MEDIA = {'image': (10 << 20, ('.jpg', '.jpeg', '.png')), 'voice': (2 << 20, ('.amr',)),
          'video': (10 << 20, ('.mp4',)), 'file': (20 << 20, ())}

_TLS_ADVICE = (
    ('certificate (is not yet valid|has expired)', '多半是这台机器的时钟不对:先校时 (NTP)'),
    ('unable to get (local )?issuer|self.signed', '没有 CA 证书:opkg install ca-bundle,或 apt / apk '
     'install ca-certificates;中转用自己的证书时,在 config.ini 里写 ca_file'),
    ('(?i)mismatch|hostname', '证书不是这个域名的:看 api_base 写对没有'),
    ('CERTIFICATE_VERIFY_FAILED', '证书验证不了:时钟不对 (NTP),没有 CA 证书 (ca-bundle、ca-certificates),api_base '
     '不是这个域名,或中转用自己的证书 (ca_file)'),
    ('getaddrinfo|Name or service|name resolution|not known', 'DNS 查不到:看网络通不通,api_base 写对没有'),
    ('Tunnel connection failed|proxy', '代理拒绝了:看环境变量 https_proxy'))


def _normal_base(text):
    """api_base 的各种写法 → ``https://host[:port][/prefix]``。"""
    base = text if '://' in text else 'https://' + text
    base = re.sub('(/cgi-bin)?/*$', '', base)
    port = re.search(r':([0-9]+)(/|$)', base.partition('//')[2])
    form = r'https?://([A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?'
    if (port and int(port.group(1)) > 65535 or not re.fullmatch(form, base)
            or re.search('[?#@]', base)):
        raise ConfigError('api_base must look like https://vps.example.com[:port][/path]')
    return base


_STARTING = threading.Lock()        # threading.stack_size 是整个进程的


def _start_thread(target, *args):
    """开一条栈有 1 MiB 的线程:musl 的默认值 128 KiB 太小,几层嵌套就能让进程崩溃。开不了抛 `RuntimeError`。"""
    with _STARTING:
        before = threading.stack_size(1 << 20)
        try:
            thread = threading.Thread(target=target, args=args, daemon=True)
            thread.start()
            return thread
        finally:
            threading.stack_size(before)


class _Threads:
    """最多 ``limit`` 件活同时做。线程做完了留着,各处共用:有空闲的就用最近用过的那条,没有才开新的。"""

    #: 空闲这么多秒的线程结束。
    idle = 2

    _lock = threading.Lock()
    _seats = []                         # 空闲线程的座位 [叫醒它的锁, 它的活],后进先出

    def __init__(self, limit):
        self._limit = limit
        self._busy = 0
        self._changed = threading.Condition()

    def submit(self, wait, job, *args):
        """交出一件活,最多等 ``wait`` 秒轮到它;轮不到、开不出线程,返回 False。"""
        with self._changed:
            if self._busy >= self._limit:
                self._changed.wait_for(lambda: self._busy < self._limit or not self._limit, wait)
            if self._busy >= self._limit:
                return False
            self._busy += 1
        with self._lock:
            seat = self._seats.pop() if self._seats else None
        if seat:
            seat[1] = self, job, args
            seat[0].release()
            return True
        try:
            _start_thread(self._sit, (self, job, args))
            return True
        except RuntimeError:            # can't start new thread
            self._ended()
            return False

    @classmethod
    def _sit(cls, work):
        seat = [threading.Lock(), None]
        seat[0].acquire()
        while work:
            pool, job, args = work
            try:
                job(*args)
            except BaseException:       # 本文件的错;线程还要接着用
                logger.error('internal error in a thread%s', _traceback())
            work = job = args = seat[1] = None
            with cls._lock:
                cls._seats.append(seat)
            pool._ended()
            if not seat[0].acquire(timeout=cls.idle):
                with cls._lock:
                    if seat in cls._seats:
                        cls._seats.remove(seat)
                        return
                seat[0].acquire()       # 活正在路上
            work = seat[1]

    def _ended(self):
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def close(self, deadline):
        """不再接活,等手里的做完,至多到 ``deadline`` (monotonic 秒);都做完了返回 True。"""
        with self._changed:
            self._limit = 0
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._busy,
                                          max(0, deadline - time.monotonic()))


if hasattr(os, 'register_at_fork'):     # fork 出来的进程里没有这些线程
    os.register_at_fork(after_in_child=_Threads._seats.clear)

#: 发请求的线程;被放弃的请求(比如 DNS 不答)还占着,直到它自己结束。
_CALLS = _Threads(64)


def _within(seconds, job, abort):
    """在另一条线程上跑 ``job()``,等到 ``seconds`` 秒为止;还没完就 ``abort()``,抛 `socket.timeout`。

    套接字自己的时限每收到一个字节就重新计时,DNS 根本没有时限。
    """
    outcome, done, deadline = [], threading.Event(), time.monotonic() + seconds

    def run():
        try:
            outcome.append((job(), None))
        except BaseException as e:      # 到等着的线程里再抛
            outcome.append((None, e))
        done.set()
    if not _CALLS.submit(seconds, run):
        raise RuntimeError('too many requests under way')
    if not done.wait(max(0, deadline - time.monotonic())):
        abort()
        raise socket.timeout('no answer within %g s' % seconds)
    value, error = outcome[0]
    if error:
        raise error
    return value


@functools.lru_cache(maxsize=None)
def _connection(base):
    """http.client 的一种连接,连上了告诉它的 `_Exchange`。"""
    class Connection(base):
        exchange = None

        def connect(self):
            base.connect(self)              # 包括代理的 CONNECT 和 TLS 握手
            self.exchange.connected_by(self.sock)
    return Connection


def _make_opener(tls):
    """urllib 的 opener:只有 http 和 https,标准的代理环境变量;不跟随重定向,什么状态都原样返回。"""
    from urllib import request as web

    class Transport(web.HTTPHandler):
        https_request = web.HTTPHandler.http_request

        def http_open(self, req):
            return self.do_open(functools.partial(req.exchange.connection, 'HTTPConnection'), req)

        def https_open(self, req):
            return self.do_open(functools.partial(req.exchange.connection, 'HTTPSConnection'), req,
                                context=tls())
    opener = web.OpenerDirector()
    opener.addheaders = [('User-Agent', 'EasyWeChat')]
    opener.add_handler(web.ProxyHandler())
    opener.add_handler(Transport())
    return opener


class _Exchange:
    """一次 HTTP 请求:走到了哪一步,怎样打断它。``connected`` 以前失败的,肯定没有到。"""

    def __init__(self, caller, within):
        self._caller = caller
        self._within = within
        self._lock = threading.Lock()
        self._socket = None
        self._aborted = False
        self.connected = False

    def connection(self, name, *args, **kwargs):
        """http.client 里叫 ``name`` 的连接;没有 ssl 的 Python 没有 HTTPSConnection。"""
        connection = _connection(getattr(http.client, name))(*args, **kwargs)
        connection.exchange = self
        return connection

    def connected_by(self, sock):
        """连上了;等的人已经走了,就不许再发出去。"""
        sock.settimeout(self._within)
        with self._lock:
            if self._aborted:
                raise OSError('too late')
            self._socket, self.connected = sock, True

    def _open(self, url, body, headers, redirects):
        from urllib.request import Request
        for left in range(redirects, -1, -1):
            request = Request(url, body, headers)
            request.exchange = self
            response = self._caller._urllib().open(request, timeout=self._caller.connect_within)
            where = response.headers.get('Location')
            if response.status not in (301, 302, 303, 307, 308) or not where or not left:
                return response
            response.close()
            where = urllib.parse.urljoin(url, where)
            if not where.startswith(('https://', url.partition('//')[0] + '//')):
                raise OSError('redirected to a lesser scheme')
            url = where

    def abort(self):
        """打断:还没连上的,连上了也不发;连上了的,关掉。"""
        with self._lock:
            self._aborted = True
        if self._socket:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def run(self, url, body, headers, consume, redirects=0):
        """→ ``consume(response)``;没有完整的回答抛 `OSError` 等。"""
        def job():
            with contextlib.closing(self._open(url, body, headers, redirects)) as response:
                return consume(response)
        return _within(self._within, job, self.abort)


def _blocks(response, limit):
    """正文,一块一块的;超过 ``limit`` 字节,或比 Content-Length 短,抛 `OSError`。"""
    length, got = response.headers.get('Content-Length'), 0
    for block in iter(functools.partial(response.read, 1 << 16), b''):
        got += len(block)
        if got > limit:
            raise OSError('answer longer than %d bytes' % limit)
        yield block
    if length and length.isdigit() and got < int(length):
        raise OSError('answer cut after %d of %s bytes' % (got, length))


class _NotWeCom(Exception):
    """回答的不是企业微信:``args`` 是 (HTTP 状态, 说明)。"""


def _too_deep(data):
    """JSON (bytes) 的括号有没有超过 64 层:有的 Python 为此崩溃,而不是抛异常。"""
    depth = 0
    for bracket in re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}"]+', b'', data):
        depth += 1 if bracket in b'[{' else -1
        if depth > 64:
            return True
    return False


def _read_json(caller, response):
    """企业微信的回答 (dict)。"""
    data = b''.join(_blocks(response, caller.max_answer))
    try:
        if _too_deep(data):
            raise ValueError('too deep')
        answer = json.loads(data.decode('utf-8'), strict=False)
        if response.status == 200 and isinstance(answer.get('errcode', 0), int):
            return answer
    except (ValueError, AttributeError, RecursionError):
        pass
    raise _NotWeCom(response.status, _show(response.headers.get('Content-Type')))


class _Local(Exception):
    """本机的错(文件没了、磁盘满了),不是网络的:``args`` 里是那个 `OSError`。"""


@contextlib.contextmanager
def _local():
    try:
        yield
    except OSError as e:
        raise _Local(e) from None


class _Upload:
    """``multipart/form-data`` 里的一个文件,边读边发;每次迭代都从头。"""

    def __init__(self, path, name, progress):
        self._path, self._progress = path, progress
        self._size = os.path.getsize(path)
        boundary = 'EasyWeChat' + binascii.hexlify(os.urandom(16)).decode()
        name = _UNPRINTABLE.sub('_', _decoded(name).replace('"', '%22').replace('\r', '%0D')
                                .replace('\n', '%0A')).replace('\\', '_')
        self._head = ('--%s\r\nContent-Disposition: form-data; name="media"; filename="%s"; '
                      'filelength=%d\r\nContent-Type: application/octet-stream\r\n\r\n'
                      % (boundary, name, self._size)).encode('utf-8')
        self._tail = ('\r\n--%s--\r\n' % boundary).encode()
        self.headers = {
            'Content-Type': 'multipart/form-data; boundary=' + boundary,
            'Content-Length': str(len(self._head) + self._size + len(self._tail))}

    def __iter__(self):
        sent = 0
        with _local(), open(self._path, 'rb') as f:
            yield self._head
            for block in iter(functools.partial(f.read, 1 << 16), b''):
                sent += len(block)
                if sent > self._size:
                    break
                yield block
                if self._progress:
                    self._progress(sent, self._size)
            if sent != self._size:
                raise OSError(errno.EBUSY, 'changed while it was sent', self._path)
        yield self._tail


class _Pace:
    """每个收件人每分钟最多 ``limit`` 条:再多的等。"""

    def __init__(self, sleep):
        self._lock = threading.Lock()
        self._slots = collections.OrderedDict()     # 收件人 → 一分钟以来的 [时刻],最近用过的收件人在后
        self._sleep = sleep

    def wait(self, receivers, limit, clock):
        """轮到的时候返回一个格子:发到了,把 ``[0]`` 改成那时的时刻。同一个收件人的先来先走。"""
        slot = [clock()]
        with self._lock:
            now = slot[0]
            while self._slots and next(iter(self._slots.values()))[-1][0] < now - 60:
                self._slots.popitem(last=False)
            for who in receivers:
                slots = self._slots.setdefault(who, [])
                self._slots.move_to_end(who)
                while slots and slots[0][0] < now - 60:
                    del slots[0]
                if slots:
                    full = slots[-limit][0] + 60 if len(slots) >= limit else 0
                    slot[0] = max(slot[0], slots[-1][0], full)
                slots.append(slot)
        if slot[0] > now:
            logger.warning('waiting %.0f s: WeCom drops more than %d messages a minute to one '
                           'receiver', slot[0] - now, limit)
            self._sleep(slot[0] - now)
        return slot


class _Caller:
    """`WeChatClient` 和 `WeChatRobot` 共用的:怎样发一个请求。类属性都可以在子类里改。"""

    #: 连接的时限,秒;JSON 调用、上传下载的时限,都是总数。
    connect_within, call_within, media_within = 5, 15, 120
    #: 连不上、企业微信繁忙 (-1) 时一共试几次;第 n 次以后停 ``pause * 2 ** (n - 1)`` 秒。
    tries, pause = 3, 1
    #: JSON 回答、下载的文件最多多少字节。
    max_answer, max_download = 2 << 20, 50 << 20
    #: 每分钟最多给一个收件人发几条:再多的,企业微信不报错就丢掉。
    per_minute = 30
    #: 上传时每发一块调用一次:``progress(sent, total)``,字节。
    progress = None
    #: 连不上时一直试到这么多秒,例如断网时的警报;0 是只试 ``tries`` 次。
    retry_within = 0

    _clock = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __init__(self, appname, ini_name, needed, settings):
        self.settings = get_config(appname, ini_name, **settings)
        for key in needed:
            if not self.settings[key]:
                raise ConfigError('%s is missing: set it in config.ini, or EASYWECHAT_%s'
                                  % (key, key.upper()))
        self.api_base = _normal_base(self.settings['api_base'] or _API_BASE)
        self._pace = _Pace(lambda seconds: self._sleep(seconds))
        self._context = None
        self._opener = None

    def __repr__(self):
        return '<%s of corpid %s>' % (type(self).__name__, _mask(self.settings['corpid']))

    def _tls(self):
        """总是验证证书的 `ssl.SSLContext`。"""
        if self._context is None:
            import ssl
            context = ssl.create_default_context()
            if self.settings['ca_file']:
                try:
                    context.load_verify_locations(self.settings['ca_file'])
                except OSError as e:
                    raise ConfigError('cannot use ca_file %s: %s' % (
                        self.settings['ca_file'], e.strerror or e)) from None
            self._context = context
        return self._context

    def _urllib(self):
        """发请求用的 urllib opener,各个线程共用。"""
        if self._opener is None:
            self._opener = _make_opener(self._tls)
        return self._opener

    def _network_error(self, error, connected, path, harmless):
        """urllib 的各种异常 → `NetworkError`,其中没有网址;``harmless`` 的调用再来一次也没关系。"""
        host = urllib.parse.urlsplit(self.api_base).netloc
        if isinstance(error, _NotWeCom):
            status, kind = error.args
            advice = {301: '中转要的是 https:照它改 api_base', 302: '中转要的是别的地址:照它改 api_base',
                      413: '中转嫌文件大:nginx 里写 client_max_body_size 21m'}.get(
                          status, '中转没有转发 /cgi-bin/%s:让它转发整个 /cgi-bin/,不改路径' % path)
            return NetworkError(502, _redact('%s answered %d %s, not JSON of WeCom' % (
                host, status, kind)), path, advice, (status == 200 or status >= 500) and not harmless)
        reason = getattr(error, 'reason', None) or error
        text = _show(_redact('%s: %s' % (type(reason).__name__, reason)), 400)
        advice = next((a for form, a in _TLS_ADVICE if re.search(form, text)), '')
        if isinstance(error, (ImportError, AttributeError)):
            advice = '这个 Python 没有 ssl:opkg install python3-openssl'
        if connected:
            return NetworkError(504, 'no complete answer from %s (%s)' % (host, text), path,
                                advice, not harmless)
        return NetworkError(503, 'cannot reach %s (%s)' % (host, text), path,
                            advice or '看网络通不通、api_base 和代理 (https_proxy) 写对没有')

    def _once(self, path, query, body, within, consume):
        """发一次 → ``consume`` 的结果。"""
        url = '%s/cgi-bin/%s?%s' % (self.api_base, path, urllib.parse.urlencode(query))
        headers, redirects = {}, 3 * (consume is not _read_json)
        harmless = body is None or isinstance(body, _Upload)
        if isinstance(body, _Upload):
            headers = body.headers
        elif body is not None:
            body = json.dumps(body, ensure_ascii=False).encode('utf-8', 'replace')
            headers = {'Content-Type': 'application/json; charset=utf-8'}
        exchange = _Exchange(self, within)
        try:
            return exchange.run(url, body, headers, functools.partial(consume, self), redirects)
        except _Local as e:
            failure = e.args[0]
        except (OSError, http.client.HTTPException, ValueError, ImportError, AttributeError,
                RuntimeError, _NotWeCom) as e:      # RuntimeError: can't start new thread
            failure = self._network_error(e, exchange.connected, path, harmless)
        raise failure       # 在 except 以外:不把带着网址的异常挂在后面

    def _request(self, path, query, body=None, within=None, consume=_read_json):
        """一次调用 → 回答 (dict)。只有肯定没到的 (503) 和企业微信叫再来的 (-1) 才重试。"""
        begin, pause = self._clock(), self.pause
        deadline = begin + (within or self.call_within)
        for n in itertools.count(1):
            try:
                left = max(deadline - self._clock(), 0.1 if n <= self.tries else self.call_within)
                answer = self._once(path, query, body, left, consume)
                if not answer.get('errcode'):
                    return answer
                errmsg = _show(_redact(str(answer.get('errmsg', ''))), 400)
                failure = APIError(answer['errcode'], errmsg, path)
            except NetworkError as e:
                failure = e
            then = self._clock() + pause
            again = failure.errcode in (-1, 503) and n < self.tries and then < deadline
            if not again and (getattr(failure, 'maybe_sent', True)
                              or then > begin + self.retry_within):
                raise failure
            logger.info('%s; again in %g s', failure, pause)
            self._sleep(pause)
            pause = min(2 * pause, 60)

    def _send_each(self, path, message, limits, send_one):
        """一条一条地发,→ 最后一条的回答。"""
        answer = None
        for n, item in enumerate(_items(message, limits)):
            try:
                answer = send_one(n, item)
            except APIError as e:
                e.errmsg += ' (the first %d parts were sent)' % n if n else ''
                raise
        if answer is None:
            raise APIError(44004, 'nothing to send', path)
        return answer

    def _upload_to(self, path, query, file, kind, name, call):
        """上传一个文件 → 回答 (dict)。"""
        body = _Upload(file, name or os.path.basename(file), self.progress)
        answer = call(path, dict(query, type=kind), body, self.media_within)
        if not isinstance(answer.get('media_id'), str):
            raise NetworkError(502, 'an answer without media_id', path)
        return answer


def _media_kind(path, kind=None):
    """文件按后缀和大小该当作什么发;``kind`` 给了就检查它。不合规定抛 `APIError`。"""
    size, suffix = os.path.getsize(path), os.path.splitext(path)[1].lower()
    name = os.path.basename(path)
    if kind not in _MEDIA and kind is not None:
        raise APIError(40004, '%r is none of %s' % (kind, ', '.join(_MEDIA)), 'media/upload')
    if kind is None:
        kind = next((k for k, (most, suffixes) in _MEDIA.items()
                     if suffix in suffixes and size <= most), 'file')
    most, suffixes = _MEDIA[kind]
    if size <= 5:
        raise APIError(44001, '%s has %d bytes, at least 6 are needed' % (name, size), 'media/upload')
    if size > most:
        raise APIError(40006, '%s has %d bytes, %s takes %d' % (name, size, kind, most), 'media/upload')
    if suffixes and suffix not in suffixes:
        raise APIError(40005, '%s: %s takes %s' % (name, kind, ', '.join(suffixes)), 'media/upload')
    return kind


def _safe_name(headers, default):
    """Content-Disposition 里的文件名,只留最后一段,去掉危险的;没有就是 ``default``。"""
    name = headers.get_filename() or default
    with contextlib.suppress(UnicodeError):     # http.client 把 UTF-8 读成了 latin-1
        name = name.encode('latin-1').decode('utf-8')
    name = _UNPRINTABLE.sub('', re.split(r'[/\\]', name)[-1]).strip(' ').lstrip('.')
    name = re.sub('[<>:"|?*]', '_', name)
    stem, suffix = os.path.splitext(name)
    if re.fullmatch('(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]', stem.partition('.')[0]):
        stem = '_' + stem
    suffix = suffix.encode('utf-8')[:20].decode('utf-8', 'ignore')
    stem = stem.encode('utf-8')[:110 - len(suffix.encode('utf-8'))].decode('utf-8', 'ignore')
    return os.fsdecode(((stem or 'file') + suffix).encode('utf-8'))     # LANG=C 时也是 UTF-8


def _save(f, default, caller, response):
    """把下载的文件写进 ``f`` → ``{'name': 文件名}``;没有 Content-Disposition 的是 JSON 的错误。"""
    if response.status != 200 or not response.headers.get('Content-Disposition'):
        return _read_json(caller, response)
    f.seek(0)
    for block in _blocks(response, caller.max_download):
        with _local():
            f.write(block)
    f.truncate()
    return {'name': _safe_name(response.headers, default)}


def _put(part, folder, name):
    """``part`` 改成 ``folder`` 里一个还没有的名字 → 路径。"""
    stem, suffix = os.path.splitext(name)
    for n in range(10000):
        path = os.path.join(folder, '%s%s%s' % (stem, '-%d' % n if n else '', suffix))
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.replace(part, path)
            return path
    raise FileExistsError(errno.EEXIST, 'too many files of this name', name)


def _code_and_message(method):
    """旧接口的约定:返回企业微信的 dict,网络或参数不对时 errcode 是 -1;不抛异常。"""
    @functools.wraps(method)
    def answer(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except (NetworkError, ConfigError) as e:
            return {'errcode': -1, 'errmsg': str(e)}
        except APIError as e:
            return {'errcode': e.errcode, 'errmsg': e.errmsg}
        except (OSError, TypeError, ValueError) as e:
            return {'errcode': -1, 'errmsg': '%s: %s' % (type(e).__name__, e)}
    return answer


def _joined(who):
    """收件人:list,或 ``'a|b'``,→ ``'a|b'``。"""
    return '|'.join(map(str, who)) if isinstance(who, (list, tuple, set)) else str(who or '')


#: 这些 errcode 以后,不再指望主动发送:凭据、IP、应用。
_CANNOT_SEND = frozenset([40001, 40013, 40056, 40091, 41002, 41004, 48006, 50003, 60020, 301002])


class WeChatClient(_Caller):
    """以应用的身份发消息,调用企业微信的任何 API。不需要 pycryptodome。

        client = WeChatClient('demo')
        client.send('磁盘 91%')                             # 发给配置里的 touser
        client.send(pathlib.Path('cam.jpg'), to='zhangsan|lisi')
        client.call('user/get', userid='zhangsan')

    ``appname``、``ini_name`` 和设置同 `get_config`,要有 corpid 和 secret,发消息还要 agentid;``store``
    放 access_token,默认是 `FileStore`。所有线程可以共用一个。
    被拒绝抛 `APIError`,没有回答抛 `NetworkError`,它是前者的一种;缺了配置抛 `ConfigError`。
    """

    #: access_token 提前多少秒换新的。
    token_margin = 300
    #: Secret 被拒绝以后,多少秒之内不再问:问多了,企业微信会封 IP 一小时。
    refused_within = 60

    def __init__(self, appname='demo', ini_name=None, store=None, **settings):
        super().__init__(appname, ini_name, ('corpid', 'secret'), settings)
        self._machine = store if isinstance(store, FileStore) else FileStore()
        self.store = _steady(self._machine if store is None else store)
        identity = self.api_base, self.settings['corpid'], self.settings['secret']
        self._token_name = ('easywechat:token:'
                            + hashlib.sha256('\0'.join(identity).encode('utf-8')).hexdigest())
        self._refused = 0, None
        #: 最近一次调用以后,能不能发消息:None 还不知道,False 是因为凭据或 IP 被拒绝。
        self.trusted = None

    # token

    def _cached_token(self, stale):
        value = self.store.get(self._token_name)
        token = value.decode('ascii', 'replace') if isinstance(value, bytes) else value
        return token if token != stale else None

    def _fetch_token(self):
        until, refusal = self._refused
        if self._clock() < until:
            raise APIError(*refusal)
        try:
            answer = self._request('gettoken', {'corpid': self.settings['corpid'],
                                                'corpsecret': self.settings['secret']})
        except APIError as e:
            if not isinstance(e, NetworkError) and e.errcode != -1:
                self._refused = (self._clock() + self.refused_within,
                                 (e.errcode, e.errmsg, e.path))
                self.trusted = False
            raise
        token, seconds = answer.get('access_token'), answer.get('expires_in')
        if not isinstance(token, str) or not re.fullmatch('[!-~]{1,512}', token):
            raise NetworkError(502, 'an answer without access_token', 'gettoken', '看 api_base 写对没有')
        seconds = seconds if isinstance(seconds, int) and seconds > 0 else 7200
        self.store.set(self._token_name, token.encode('ascii'),
                       ex=max(seconds - self.token_margin, seconds // 2, 1))
        return token

    def get_token(self, stale=None):
        """access_token (str),从存储里,或向企业微信要(path/91039);一台机器上同时只有一个去要。

        ``stale`` 是已经不能用的那个:存着的还是它,才要新的。
        """
        token = self._cached_token(stale)
        if token is None:
            with self._machine.lock(self._token_name, kind='token'):
                token = self._cached_token(stale) or self._fetch_token()
        if token not in _secrets:
            _secrets.append(token)
        return token

    def _authorized(self, path, query, body=None, within=None, consume=_read_json):
        """带着 access_token 的 `_request`;token 不能用了就换一个,再试恰好一次。"""
        token = self.get_token()
        for last in False, True:
            try:
                answer = self._request(path, dict(query, access_token=token), body, within, consume)
                self.trusted = True
                return answer
            except APIError as e:
                if e.errcode in _CANNOT_SEND:
                    self.trusted = False
                if last or e.errcode not in (40014, 42001):
                    raise
            token = self.get_token(stale=token)

    def call(self, path, body=None, **query):
        """企业微信的任何 API → 它的回答 (dict)。

        ``path`` 是 /cgi-bin/ 后面的,例如 'user/get';``body`` (dict) 给了就是 POST,否则 GET;其余的
        参数进查询串。access_token 不用管。
        """
        path = re.sub('^/?(cgi-bin/)?', '', path)
        if not re.fullmatch('[A-Za-z0-9_./-]+', path):
            raise ValueError('not the path of an API: %s' % _show(path))
        return self._authorized(path, query, body)

    # 发消息

    def send(self, message, to=None, party=None, tag=None, **fields):
        """发一条或几条消息,依次;返回企业微信对最后一条的回答 (dict,有 msgid)。

        ``message``:str(超过 2048 字节就分成几条)、`pathlib.Path`(上传,按后缀当作图片、语音、视频、文件)、
        官方的 JSON ``{'msgtype': …}``(path/90236)、被动回复那样的 dict,或它们的 list、生成器。
        ``to``、``party``、``tag``:list 或 ``'a|b'``;都没有就是消息里写的,再没有是配置里的 touser。
        ``fields`` 是 JSON 最外层别的字段,例如 ``safe=1``。
        部分收件人不对不是错误:回答里有 invaliduser 等,并写日志。
        """
        given = {'touser': to, 'toparty': party, 'totag': tag}
        given = {key: _joined(who) for key, who in given.items() if who is not None}
        return self._send_each('message/send', message, _TEXT_LIMITS, lambda n, item: self._send_one(
            item, given, fields))

    def _send_one(self, item, given, fields):
        if isinstance(item, os.PathLike):
            kind = _media_kind(item)
            item = {'msgtype': kind, kind: {'media_id': self.upload(item, kind)}}
        message = _build_message(item)
        message.update(fields)
        keys = 'touser', 'toparty', 'totag'
        if given:
            message = {k: v for k, v in message.items() if k not in keys}
            message.update((key, who) for key, who in given.items() if who)
        elif not any(message.get(key) for key in keys):
            message['touser'] = self.settings['touser']
        who = [key + i for key in keys for i in str(message.get(key) or '').split('|') if i]
        if not who:
            raise APIError(82001, 'no receiver', 'message/send')
        agentid = str(message.get('agentid') or self.settings['agentid'])
        if not re.fullmatch('[0-9]{1,18}', agentid):
            raise ConfigError('agentid is missing or no number: set it in config.ini, or '
                              'EASYWECHAT_AGENTID')
        message['agentid'] = int(agentid)
        slot = self._pace.wait(who, self.per_minute, self._clock)
        try:
            answer = self._authorized('message/send', {}, message)
        finally:
            slot[0] = max(slot[0], self._clock())
        partial = {k: answer[k] for k in ('invaliduser', 'invalidparty', 'invalidtag',
                                          'unlicenseduser') if answer.get(k)}
        if partial:
            logger.warning('message/send reached not everybody: %s', _show(partial))
        return answer

    @_code_and_message
    def send_media(self, media_type, media_content, touser, toparty='', totag=''):
        """旧接口:``media_content`` 是这种消息的 dict,或 str(正文、media_id)。返回 dict,不抛异常。"""
        if isinstance(media_content, str):
            key = 'content' if media_type in _TEXT_LIMITS else 'media_id'
            media_content = {key: media_content}
        return self.send({'msgtype': media_type, media_type: media_content}, touser, toparty, totag)

    # 素材

    def upload(self, path, kind=None, name=None):
        """上传临时素材(path/90253)→ media_id (str),三天有效。边读边发,不占内存。

        ``kind`` 是 image(10 MB,JPG、PNG)、voice(2 MB,AMR)、video(10 MB,MP4)、file(20 MB),默认按
        后缀;``name`` 是显示的文件名。
        读不了文件抛 `OSError`,大小、类型不对抛 `APIError`。
        """
        return self._upload(path, kind, name)['media_id']

    def _upload(self, path, kind=None, name=None):
        path = os.fspath(path)
        return self._upload_to('media/upload', {}, path, _media_kind(path, kind), name,
                               self._authorized)

    @_code_and_message
    def upload_media(self, file_type, file_path):
        """旧接口:上传,返回企业微信的 dict,不抛异常。"""
        return self._upload(file_path, file_type)

    def download(self, media_id, folder='.'):
        """下载素材(path/90254)到 ``folder``,返回 `pathlib.Path`;至多 50 MiB,不占内存。

        文件名由企业微信给,去掉路径和危险的字符;已经有的不覆盖,加 -1、-2。写不了抛 `OSError`。
        """
        import pathlib
        part = os.path.join(os.fspath(folder), '.easywechat-%s.part'
                            % binascii.hexlify(os.urandom(8)).decode())
        try:
            with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), 'wb') as f:
                answer = self._authorized('media/get', {'media_id': media_id}, None,
                                          self.media_within, functools.partial(_save, f, media_id))
            if 'name' not in answer:
                raise NetworkError(502, 'an answer that is no file', 'media/get')
            return pathlib.Path(_put(part, os.fspath(folder), answer['name']))
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)


class WeChatRobot(_Caller):
    """群机器人(path/91770):一个 key,没有 token,没有可信 IP。

        WeChatRobot('693a91f6-…').send('构建失败', mention='@all')

    ``key`` 是 Webhook 地址里 key= 后面的,或整个地址;不给就是配置里的 robot。错误同 `WeChatClient`。
    """

    per_minute = 20

    def __init__(self, key=None, appname='demo', ini_name=None, **settings):
        if key:
            settings['robot'] = key
        super().__init__(appname, ini_name, ('robot',), settings)
        self._key = re.sub('.*[?&]key=([^&#]*).*', r'\1', self.settings['robot'])
        if not re.fullmatch('[0-9A-Za-z_-]{1,128}', self._key):
            raise ConfigError('robot must be the key of the webhook, or its whole URL')
        _secrets.append(self._key)

    def send(self, message, mention=None):
        """发一条或几条消息 → 对最后一条的回答 (dict)。每分钟至多 20 条,多的等。

        ``message``:str、官方的 JSON、`pathlib.Path`(2 MB 以内的 JPG、PNG 是图片,AMR 是语音,别的是文件),
        或它们的 list。``mention`` 只用于文本:userid、手机号或 ``'@all'``,list 或 ``'a|b'``。
        """
        who = [i for i in _joined(mention).split('|') if i]
        return self._send_each('webhook/send', message, _ROBOT_LIMITS, lambda n, item: self._send_one(
            item, who * (n == 0)))

    def _send_one(self, item, who):
        if who and isinstance(item, os.PathLike) or isinstance(item, dict) and \
                item.get('msgtype', 'text') != 'text' and who:
            raise TypeError('mention goes with text only')
        body = self._file(item) if isinstance(item, os.PathLike) else _build_message(item)
        if who:
            phones = [i for i in who if re.fullmatch('[0-9]{11}', i)]
            body['text'] = dict(body['text'], mentioned_mobile_list=phones,
                                mentioned_list=[i for i in who if i not in phones])
        slot = self._pace.wait(['robot'], self.per_minute, self._clock)
        try:
            return self._request('webhook/send', {'key': self._key}, body)
        finally:
            slot[0] = max(slot[0], self._clock())

    def _file(self, path):
        kind = _media_kind(path)
        if kind == 'image' and os.path.getsize(path) <= 2 << 20:
            with open(path, 'rb') as f:
                data = f.read()
            return {'msgtype': 'image', 'image': {
                'base64': binascii.b2a_base64(data, newline=False).decode(),
                'md5': hashlib.md5(data).hexdigest()}}
        kind = kind if kind == 'voice' else 'file'
        return {'msgtype': kind, kind: {'media_id': self.upload(path, kind)}}

    def upload(self, path, kind='file', name=None):
        """上传文件或语音(kind 是 file、voice)→ media_id (str),三天有效,只有这个机器人能用。"""
        path = os.fspath(path)
        return self._upload_to('webhook/upload_media', {'key': self._key}, path,
                               _media_kind(path, kind), name, self._request)['media_id']


# ---- 回调模式 Dispatcher ----------------------------------------------------------------------
# 字节进来,完整的回答 (status, headers, body) 出去;这里没有套接字。
# 顺序:限制 → 切信封 → 格式 → 签名 → 时间 → AES → 填充、长度、receiveid → 里面的 XML → 认领 → 回调。
# 一条消息只跑一次回调:先认领(存储里的一条记录),再跑;重复投递得到存下的答复,或等同一次还没跑完的回调。

def _at_once(job, *args):
    job(*args)
    return True


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

_LENGTH = re.compile('[0-9]{1,9}')
_RELEASED = 1795392000      # 2026-11-23:比这还早的时钟是没有校过的


def _parse_query(query):
    """查询串 → 四个参数里有的那些。每个最多一次,百分号解码一次,严格 UTF-8;别的不看。"""
    found = {}
    try:
        if query.count('&') >= 16:
            raise ValueError('more than 16 parameters in the query')
        for part in query.split('&'):
            name, _, value = part.partition('=')
            if name in found:
                raise ValueError('%s stands twice in the query' % name)
            if name in _PARAMETERS:
                found[name] = value if value.isalnum() else urllib.parse.unquote_plus(
                    value, errors='strict')         # 字母和数字没有要解码的,多半就是
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
    if not _LENGTH.fullmatch(length):
        raise WeChatError(400, 'malformed Content-Length')
    if int(length) > limit:
        raise WeChatError(413, 'body of %s bytes, max_body is %d' % (length, limit))
    return int(length)


class _Run:
    """一次正在跑的回调;重复投递在这里等同一个结果。"""

    __slots__ = ('name', 'kind', 'user', 'corp', 'id', 'response_code', 'begin', 'record', 'leased',
                 'lock', 'first', '_gate', 'done', 'reply', 'started', 'waiting', 'held', 'pushing',
                 'items', 'ended')

    def __init__(self, name, msg, first):
        self.name = name                # 在存储里
        # 回调可以改它的 dict,所以先记下
        self.kind, self.user, self.corp, self.id, self.response_code = (
            str(msg.get(k, '')) for k in ('MsgType', 'FromUserName', 'ToUserName', 'MsgId',
                                          'ResponseCode'))
        self.begin = time.monotonic()
        self.record = threading.Lock()  # 它在存储里的记录:存储可能很慢
        self.leased = None              # 认领到了:上次续租的时刻
        self.lock = threading.Lock()    # 下面这些
        self.first = first              # 怎样回答第一次投递;回答过了是 None
        self._gate = threading.Lock()   # 开着就是有了答案
        self._gate.acquire()
        self.done = False
        self.reply = None               # bytes;b'' 是空的 200,None 是没有答案
        self.started = False            # 占到名额,在跑了
        self.waiting = 0                # 还有几次投递在等
        self.held = None                # 第一条结果,和它写成的被动回复:只有它一条,就是答复
        self.pushing = False            # 企业微信已经得到空的 200,结果都主动发送
        self.items = []                 # 等着主动发送的
        self.ended = False              # 不会再有了

    def finish(self, reply):
        """拿着 ``lock``:有答案了,回答第一次投递,放等着的过去;已经有了就不变。None 是没有答案。"""
        if not self.done:
            self.reply, self.done = reply, True
            self._gate.release()
        self.answer()

    def wait(self, until):
        """等答案,至多到 ``until`` (monotonic 秒);返回有没有。"""
        if not self.done and self._gate.acquire(timeout=max(0, until - time.monotonic())):
            self._gate.release()        # 还有别的投递在等
        return self.done

    def answer(self):
        """拿着 ``lock``:回答第一次投递,没有答案就断开;已经回答过就算了。"""
        first, self.first = self.first, None
        if first:
            first(self.reply)


class _Outbox:
    """主动发送的队列:给一个用户的,按他的消息来的先后;各个用户互不等待。"""

    #: 先来的消息没有结果,后来的最多等它多少秒:有的回调再也不返回。
    patience = 60

    def __init__(self, send, submit):
        self._send = send               # send(run, 一条)
        self._submit = submit           # 在别的线程上跑,不行返回 False
        self._lock = threading.Lock()
        self._queues = {}               # 用户 → 他还没完的 _Run,先来的在前
        self._busy = set()              # 正有线程在替他发的用户

    def join(self, run):
        """``run`` 排进队里。"""
        with self._lock:
            self._queues.setdefault(run.user, []).append(run)

    def _turn(self, user):
        """轮到的 `_Run`,它有要发的;没有是 None。"""
        queue = self._queues.get(user, ())
        for run in list(queue):
            if run.items:
                return run
            if run.ended:
                queue.remove(run)
            elif time.monotonic() - run.begin < self.patience:
                return None
        if not queue:
            self._queues.pop(user, None)
        return None

    def kick(self, user):
        """有轮到的就发;同时只有一条线程替一个用户发。"""
        with self._lock:
            if user in self._busy or not self._turn(user):
                return
            self._busy.add(user)
        if not self._submit(self._drain, user):
            self._drain(user)

    def _drain(self, user):
        while True:
            with self._lock:
                run = self._turn(user)
                if not run:
                    self._busy.discard(user)
                    return
                item = run.items.pop(0)
            self._send(run, item)

    def left(self):
        """还没完的 (list)。"""
        with self._lock:
            return [run for queue in self._queues.values() for run in queue
                    if run.items or not run.ended]


class Dispatcher:
    """一个应用的回调:登记函数,把 HTTP 请求变成回答。

    ``appname``、``ini_name`` 和设置同 `get_config`;缺少 corpid、token 或 encoding_aes_key,抛 `ConfigError`。
    本身是 WSGI 可调用对象(PEP 3333);别的框架用 `handle`。类属性都可以在子类里改。
    """

    #: 请求正文的上限,字节。
    max_body = 1 << 20
    #: 请求里的时间与本机最多差多少秒;0 是不检查。
    max_skew = 300
    #: 一次投递等回调的秒数:企业微信等 5 秒。到时还没有结果,能主动发送的应用回空的 200,有了结果再发。
    answer_within = 4.5
    #: 不能主动发送的应用等到这时:企业微信断开、再投递,接着等。它断开而不是我们,隔着代理也一样。
    hold_within = 6
    #: 认领的租期,秒:活着的进程一直续,死了的到期由下一次投递接手。
    lease = 3
    #: 同时最多跑多少个回调;再多的等前面的,等不到的由企业微信重新投递。
    max_callbacks = 32

    _now = staticmethod(time.time)

    def __init__(self, appname='demo', ini_name=None, store=None, **settings):
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
        #: 认领过的消息放在哪里。
        self.store = MemoryStore() if store is None else _steady(store)
        self._token_store = store
        self._client = None
        self._outbox = _Outbox(self._push, lambda *job: self._helpers.submit(0, *job))
        self._lock = threading.Lock()   # 下面一个,和 _Run.waiting
        self._watching = None           # 有一条线程在看时间:它的进程号
        self._asked = 0                 # 上次问能不能发的时刻
        self._callbacks, self._patterns = {}, []
        self._running = {}              # 存储里的名字 → _Run
        self._slots = threading.Semaphore(self.max_callbacks)
        self._make_pools()
        self._refusals = _RefusalLog()
        self._clock_warned = False
        if self.settings['secret']:
            self.client     # noqa: B018    写错的 api_base 现在就报,不等到第一个慢的回调

    def _make_pools(self):
        self._threads = _Threads(self.max_callbacks)            # `handle` 的回调
        self._errands = _Threads(self.max_callbacks)            # 写存储
        self._helpers = _Threads(2 * self.max_callbacks)        # 主动发送

    def __repr__(self):
        return '<%s %s, corpid %s>' % (type(self).__name__, self.appname,
                                       _mask(self.settings['corpid']))

    @property
    def app(self):
        """自己:WSGI 可调用对象,例如 ``gunicorn bot:server.app``。"""
        return self

    @property
    def client(self):
        """同一个应用的 `WeChatClient`;没有 secret 抛 `ConfigError`。"""
        if self._client is None:
            self._client = WeChatClient(self.settings, store=self._token_store)
        return self._client

    def _can_send(self, wait):
        """能不能主动发送。还不知道,或者一分钟以前不行,就问一次;``wait`` 为假时在后台问。"""
        if not self.settings['secret'] or not self.settings['agentid']:
            return False
        now = time.monotonic()
        if not self.client.trusted and (self.client.trusted is None or now - self._asked > 60):
            if wait:
                self._ask()
            elif now - self._asked > self.answer_within:
                self._helpers.submit(0, self._ask)
        return bool(self.client.trusted)

    def _ask(self):
        self._asked = time.monotonic()
        with contextlib.suppress(APIError):
            self.client.call('agent/get', agentid=self.settings['agentid'])

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

    def _work(self, run, msg):
        """跑回调,回答,存下答复。"""
        run.started = True
        try:
            self._call(run, msg)
            self._conclude(run, run.held[1] if run.held else b'')
            with run.record:
                self._record(run)
        except BaseException:           # _call 自己不抛;到这里是本文件的错,仍要叫醒等着的
            logger.error('internal error after the callback%s', _traceback())
            with run.lock:
                run.finish(b'')
        finally:
            self._slots.release()
            self._forget(run)

    def _forget(self, run):
        """这次完了,不会再有结果。"""
        run.ended = True
        self._running.pop(run.name, None)
        self._outbox.kick(run.user)

    def _call(self, run, msg):
        """用户的回调,和它返回的东西。出错记日志;企业微信得到空的 200,否则它会再投递。"""
        func, args = self._find_callback(msg)
        if func is None:
            logger.debug('no callback for %s', _show(run.kind))
            return
        try:
            for item in _items(func(msg, *args)):
                if not self._add(run, item):
                    break
        except BaseException as e:      # 用户的代码,连 sys.exit() 也在内
            logger.error('callback %s failed on %s from %s%s',
                         getattr(func, '__qualname__', repr(func)), _show(run.kind),
                         _show(run.user), _traceback())
            if self.debug:
                self._add(run, '%s: %s' % (type(e).__name__, e))

    def _add(self, run, item):
        """回调的又一条结果。只有一条,就留着做被动回复;不止一条,或只能主动发送的,就主动发送。

        返回 False:这个应用不能主动发送,再多的也没有用。
        """
        if not run.pushing:
            if isinstance(item, os.PathLike) and _media_kind(item) in _REPLY_FIELDS:
                kind = _media_kind(item)
                item = {'MsgType': kind, 'MediaId': self.client.upload(item, kind)}
            if isinstance(item, str) or isinstance(item, dict) and 'msgtype' not in item:
                reply = _build_reply(item, run.kind, run.user, run.corp, self._now())
                reply = dict_to_xml(reply).encode('utf-8')  # 写不成的在这里就报出来,算作回调的错
                with run.lock:
                    if run.held is None and not run.pushing:
                        run.held = item, reply
                        return True
            if not run.pushing and not self._can_send(wait=True):
                logger.warning('not sent to %s: only one passive reply is possible without '
                               'secret, agentid and a trusted IP', _show(run.user))
                return False
            self._conclude(run, None)
        run.items.append(item)
        self._outbox.kick(run.user)
        return True

    def _push(self, run, item):
        """主动发给那个用户;送不到就写日志。"""
        try:
            update = _build_card_update(item, run.user, run.response_code)
            if update:
                update['agentid'] = int(self.settings['agentid'])
                self.client.call('message/update_template_card', update)
                return
            if not isinstance(item, os.PathLike):
                item = _build_message(item, run.kind)
            self.client.send(item, to=run.user)
        except Exception as e:          # 回调给的是什么都有可能;别的还要接着发
            logger.error('not delivered to %s, the answer to message %s: %s', _show(run.user),
                         _show(run.id), _show(e, 400))

    def _conclude(self, run, reply):
        """``reply`` 是这条消息的答复:交给等着的投递。已经有了就不变。

        None 是不让企业微信再等:它得到空的 200,已有的和以后的结果都主动发送。
        """
        with run.lock:
            late = reply and not run.done and not run.waiting and not run.first
            if late and self._can_send(wait=False):     # 没有投递在等了
                reply = None
            if reply is None and not run.done:
                if run.held:
                    run.items.append(run.held[0])
                run.pushing = True
            run.finish(reply or b'')
        if late and reply:
            logger.warning('the answer to message %s of %s came after %.0f s, when no delivery '
                           'waited for it', _show(run.id), _show(run.user),
                           time.monotonic() - run.begin)

    def _record(self, run):
        """拿着 ``run.record`` 写它在存储里的记录:没有跑完的是租约,跑完的是答复,没能跑的不留。"""
        if not run.done:
            self.store.set(run.name, b'-', ex=self.lease)
        elif run.reply is not None:
            self.store.set(run.name, b'+' + run.reply, ex=self._keep())
        else:
            self.store.delete(run.name)

    def _renew(self, run):
        if run.record.acquire(False):       # 上一次还没写完,就不必了
            try:
                self._record(run)
            finally:
                run.record.release()

    def _watch(self):
        """有回调在跑的时候,一条线程看着时间;十秒没有回调就结束。"""
        slow, quiet = min(self.lease / 3, self.answer_within), 0
        tick = min(slow / 10, 0.1)
        while quiet < 10:
            time.sleep(tick)
            quiet = 0 if self._running else quiet + tick
            for run in list(self._running.values()):
                if run.leased and time.monotonic() - run.begin >= slow:
                    self._look_at(run)
        with self._lock:
            self._watching = None
        if self._running:                   # 刚来的,它以为还有人看着
            self._keep_watch()

    def _keep_watch(self):
        here = os.getpid()                  # fork 以后,别人的线程不算
        with self._lock:
            start, self._watching = self._watching != here, here
        try:
            if start:
                _start_thread(self._watch)
        except RuntimeError as e:           # can't start new thread:企业微信自己会断开
            self._watching = None
            logger.error('nobody watches the time of running callbacks: %s', e)

    def _look_at(self, run):
        """慢的回调:续租;到时候替它回答第一次投递。存储可能很慢,别的线程去写。"""
        try:
            now = time.monotonic()
            if now - run.leased >= self.lease / 3 and self._errands.submit(0, self._renew, run):
                run.leased = now
            if run.done:
                return
            can_send = self._can_send(wait=False)
            if now - run.begin >= self.answer_within and can_send and run.started:
                self._push_later(run)
            elif now - run.begin >= self.hold_within:
                with run.lock:
                    run.answer()
        except Exception:                   # 本文件的错;别的回调还要有人看着
            logger.error('internal error in the clock%s', _traceback())

    def _push_later(self, run):
        self._conclude(run, None)
        self._outbox.kick(run.user)

    def _give_up(self, run):
        """这次跑不成:断开,不留记录,企业微信会再投递。"""
        with run.lock:
            run.finish(None)
        with run.record:
            self._record(run)
        self._forget(run)

    def _start(self, run, msg, spawn):
        """认领到了:去跑;同时跑着的太多,就等到不能再等为止。"""
        run.leased = run.begin
        self._outbox.join(run)
        self._keep_watch()
        if self._slots.acquire(timeout=self.hold_within):
            if spawn(self._work, run, msg):
                return
            self._slots.release()
        logger.error('all %d callbacks are busy, or no thread can be started; WeCom will deliver '
                     'again', self.max_callbacks)
        self._give_up(run)

    def _begin(self, run, msg, spawn):
        """认领到了就跑;别的进程认领了就等它的答复,它死了就接手。"""
        while not self.store.set(run.name, b'-', ex=self.lease, nx=True):
            stored = self.store.get(run.name) or b'-'
            if stored[:1] == b'+' or time.monotonic() - run.begin > self.hold_within:
                del self._running[run.name]
                with run.lock:
                    run.finish(stored[1:] if stored[:1] == b'+' else None)
                return
            time.sleep(self.lease / 60)
        self._start(run, msg, spawn)

    def _deliver(self, msg, answer, spawn):
        """一次投递:跑回调,或等同一条消息正在跑的那次;``answer(回复的 XML,或没有答案的 None)`` 恰好一次。"""
        name, begin = self._claim_name(msg), time.monotonic()
        while True:
            mine = _Run(name, msg, answer)
            run = self._running.setdefault(name, mine)
            if run is mine:
                break
            self._wait_for(run, begin)
            # 等的那次也只是在等别的进程,比这次先到时限:接着等
            if (not run.done or run.reply is not None
                    or time.monotonic() - begin >= self.hold_within):
                return answer(run.reply)
            time.sleep(self.lease / 60)
        try:
            self._begin(run, msg, spawn)
        except BaseException as e:          # 本文件的错:不能留下一个谁也等不到的
            with run.lock:
                run.finish(None)
            self._forget(run)
            if not isinstance(e, Exception):
                raise
            logger.error('internal error in a delivery%s', _traceback())

    def _wait_for(self, run, begin):
        """等 ``run`` 的答案,最多三次投递一起等,各占一条线程。"""
        with self._lock:
            run.waiting += 1
        try:
            if run.waiting <= 3 and not run.wait(begin + self.answer_within):
                if run.started and self._can_send(wait=False):      # 看时间的线程开不出来
                    self._push_later(run)
                run.wait(begin + self.hold_within)
        finally:
            with self._lock:
                run.waiting -= 1

    def finish(self, deadline):
        """等正在跑的回调和正在发送的,至多到 ``deadline`` (monotonic 秒);没有送到的写日志。"""
        while self._running and time.monotonic() < deadline:
            time.sleep(0.02)
        pools = self._threads, self._errands, self._helpers     # 最后的一个发出前面给的
        self._make_pools()
        for pool in pools:
            pool.close(deadline)
        for run in self._outbox.left():
            logger.warning('stopped before the answer to message %s of %s was delivered',
                           _show(run.id), _show(run.user))

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
        """POST 的信封 → 消息 (dict)。"""
        text = self._open(query, _cut_encrypt(body))
        try:
            msg = xml_to_dict(text)
        except FormatException as e:
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, e.errmsg) from None
        logger.debug('message %.2000s', msg)
        return msg

    def _query_of(self, method, target):
        """路径和方法对了 → 查询串的参数;没有查询串的 GET 是 None。"""
        path, _, query = target.partition('?')
        if not (path.rstrip('/') if path[-2:] != '//' else path).endswith('/' + self.route):
            raise WeChatError(404, 'path %s, expected /%s' % (_show(path), self.route))
        if method not in ('GET', 'HEAD', 'POST'):
            raise WeChatError(405)
        return _parse_query(query) if query or method == 'POST' else None

    def _echo_back(self, method, query):
        """GET:校验的 echostr,或一句话;→ 正文 (bytes)。"""
        if query is None:
            text = 'EasyWeChat is up. Enter this URL in the console of WeCom.\n'
        else:
            text = self._open(query, _echostr(query.get('echostr')))
        return b'' if method == 'HEAD' else text.encode('utf-8')

    def _reply_to(self, query, client, send, reply):
        """被动回复的 XML (bytes;空的是没有,None 是没有答案) → 加密,``send`` 出去。"""
        if reply is None:
            return send(*self.refuse(WeChatError(503), client))
        if reply:       # 时间照抄请求的:刚验过,而这里的时钟可能没有校过
            reply = self.wxcpt.encrypt_message(reply, query['nonce'], query['timestamp'])
            reply = reply.encode('utf-8')
        return send(*self._ok('text/xml', reply))

    @staticmethod
    def _ok(content_type, body):
        return 200, [('Content-Type', content_type + '; charset=utf-8'),
                     ('Content-Length', str(len(body))),
                     ('X-Content-Type-Options', 'nosniff')], body

    def refuse(self, error, client=''):
        """一个 `WeChatError` → 记下原因,返回没有正文的回答。"""
        if error.status != 503:
            self._refusals.write(client, error)
        headers = [('Content-Type', 'text/plain; charset=utf-8'), ('Content-Length', '0'),
                   ('X-Content-Type-Options', 'nosniff')]
        if error.status == 405:
            headers.append(('Allow', 'GET, HEAD, POST'))
        return error.status, headers, b''

    def respond(self, method, target, body, client, send, spawn=_at_once):
        """一个请求 → 恰好一次 ``send(status, headers, body)``,不抛异常;参数同 `handle`。

        回调就在这条线程上跑,跑完才返回(``spawn`` 可以把它交给别的线程):它慢,到时候另一条线程会替它
        ``send``。``send`` 不许抛异常。
        """
        try:
            query = self._query_of(method, target)
            if method != 'POST':
                answer = self._ok('text/plain', self._echo_back(method, query))
            elif len(body) > self.max_body:
                raise WeChatError(413)
            else:
                msg = self._receive(query, body)
                return self._deliver(
                    msg, functools.partial(self._reply_to, query, client, send), spawn)
        except WeChatError as e:
            answer = self.refuse(e, client)
        except Exception:               # 最后一道:不许有请求让服务器停下
            logger.error('internal error%s', _traceback())
            answer = self.refuse(WeChatError(500), client)
        return send(*answer)

    def handle(self, method, target, body=b'', client=''):
        """一个请求 → ``(status, headers, body)``,不抛异常。任何线程都可以用。

        ``method`` 和 ``target``(路径和查询串,没有解码过)是 str,``body`` 是 bytes,``client`` 是对方的
        地址,只用于日志。``status`` (int) 503 是现在没有答案:能断开连接的外壳断开,企业微信就会再投递。
        回调在另一条留着的线程上跑,等它到 ``answer_within`` 或 ``hold_within``。
        """
        answers, ready = [], threading.Lock()
        ready.acquire()

        def send(*answer):
            answers.append(answer)
            ready.release()
        self.respond(method, target, body, client, send,
                     functools.partial(self._threads.submit, 1))
        if not ready.acquire(timeout=self.hold_within + 1):     # 开不出看时间的线程
            return self.refuse(WeChatError(503), client)
        return answers[0]

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
# http.server 的外壳:一个连接一个请求,一个严格的读法,一次 sendall,关闭。它什么也不决定,回答来自 respond。
# 时限都是总数,走一个字节不会重新计时;连接满了,关掉读得最久的那个,正在等回调的从不关。

#: 请求行和头部 (RFC 9112 §3、§5):大写的方法,以一个 / 开头的可见 ASCII,名字是 token,没有折行。
_HEAD = re.compile(rb'([A-Z]{1,16}) (/(?!/)[!-~]*) HTTP/1\.[01]\r\n'
                   rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)")
#: 半个请求行至少要像的样子;TLS、SSH、杂音在头几个字节就露馅。
_HEAD_START = re.compile(rb'[A-Z]{1,16}(?:\Z| (?:\Z|/(?!/)))')
#: 这些头部要看,每个至多一次;别的不看。
_READ = frozenset(['host', 'content-length', 'transfer-encoding', 'content-encoding', 'expect'])


def _parse_head(head):
    """空行以前的 bytes → ``(方法, 目标, 要看的头部)``;头部是 dict,名字小写。不合规矩抛 `WeChatError`。"""
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
        if name in _READ:
            if name in fields:
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
        self.request.setblocking(False)     # 先读、先写,不行再等:多半不必等,省去两次 poll

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
                self._send(*app.refuse(e, client))
            else:
                self.server.done_reading(self.request)
                app.respond(method, target, body, client, self._send)
        except (_Gone, OSError) as e:
            logger.debug('%s is gone: %s', client, _show(e))

    def _receive(self, deadline, size=1 << 12):
        """再读一些,至多到 ``deadline`` (monotonic 秒);``size`` 大了,malloc 的碎片就多。"""
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Gone('out of time')
        try:
            data = self.request.recv(size)
        except BlockingIOError:
            self.request.settimeout(left)
            try:
                data = self.request.recv(size)
            except socket.timeout:
                raise _Gone('out of time') from None
            self.request.setblocking(False)
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
            self._write_all(b'HTTP/1.1 100 Continue\r\n\r\n')
        while missing > 0:
            self.server.has_read(self.request, len(parts[-1]))
            data = self._receive(begin + app.request_within, min(missing + 1, 1 << 16))
            parts.append(data[:missing])
            self._rest = data[missing:]
            missing -= len(data)
        return method, target, b''.join(parts)

    def _send(self, status, headers, body):
        """写出回答,关闭;慢的回调,是别的线程替它写。503:断开,企业微信就会再投递;答了 503 却未必。"""
        try:
            if status != 503:
                self._write(status, headers, body)
        except (_Gone, OSError) as e:
            logger.debug('%s is gone: %s', self.client_address[0], _show(e))
        finally:
            self.request.close()

    def _write(self, status, headers, body):
        head = ['HTTP/1.1 %d %s' % (status, http.client.responses[status])]
        for name, value in headers:
            if not value.isprintable():
                raise ValueError('control character in header %s' % name)
            head.append('%s: %s' % (name, value))
        head.append('Connection: close\r\n\r\n')
        self._write_all('\r\n'.join(head).encode('latin-1') + body)
        if self._refused or self._rest:
            self._linger()

    def _write_all(self, data):
        try:
            sent = self.request.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.request.settimeout(self.server.dispatcher.write_within)
            self.request.sendall(data[sent:])
            self.request.setblocking(False)

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
        self._closed = False
        self._reading = collections.OrderedDict()       # 还在读的套接字,旧的在前 → 读了多少字节正文
        self._most = self._limit(dispatcher.max_connections)
        self._threads = _Threads(self._most + 4 * dispatcher.max_callbacks)
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

    def start(self):
        """在后台线程里开始服务;开不出线程抛 `RuntimeError`。"""
        # Linux 上 close() 的 shutdown 叫得醒 accept;别处自己醒
        self.socket.settimeout(None if sys.platform.startswith('linux') else 0.2)
        self._acceptor = _start_thread(self._accept)

    def _accept(self):
        """一条线程接连接,交给别的线程去做。它不许停。"""
        while not self._closed:
            try:
                self.process_request(*self.socket.accept())
            except (socket.timeout, ConnectionError):       # ConnectionError:对方又走了
                continue
            except Exception as e:          # 也有 MemoryError
                if self._closed:
                    return
                if not isinstance(e, OSError):
                    logger.error('internal error in the server%s', _traceback())
                if getattr(e, 'errno', errno.ENOMEM) in (
                        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._evict(len(self._reading) - 8)
                time.sleep(0.05)            # 马上再来也没有用

    def process_request(self, request, client_address):
        """读、答、关,在另一条线程上。"""
        with self._lock:
            self._reading[request] = 0
        self._evict(self._most)
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

    def _evict(self, keep):
        """还在读的最多留 ``keep`` 个,旧的先走。只关读的方向:已经到了的请求照样读完、回答。"""
        with self._lock:
            while len(self._reading) > max(keep, 0):
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
            self._evict(len(self._reading) - 1)

    def done_reading(self, request):
        """请求读完了:这个连接不再占读的名额。"""
        with self._lock:
            self._reading.pop(request, None)

    def close(self, deadline):
        """不再接受连接,关掉还在读的,等正在回答的;都完了返回 True。"""
        self._closed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)      # 叫醒 accept
        self._acceptor.join(2)              # 它停了才关:描述符的号会被别人再用
        self.server_close()
        self._evict(0)
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


def _one_heap():
    """glibc 给每条线程一个堆,各有各的碎片;有 GIL,一个就够,少占几 MB。别的 libc 没有这回事。"""
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes
        ctypes.CDLL(None).mallopt(-8, 1)        # M_ARENA_MAX


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

    def __init__(self, appname='demo', ini_name=None, store=None, **settings):
        super().__init__(appname, ini_name, store, **settings)
        self._http = None

    def start(self, host='0.0.0.0', port=8000):
        """在后台线程里开始服务,返回真正的 ``(host, port)``;端口 0 由系统挑。

        ``host`` 也可以是 IPv6 的地址,``'::'`` 是两种都听。
        地址用不了抛 `OSError`,已经在服务抛 `RuntimeError`。
        """
        if self._http:
            raise RuntimeError('already started')
        _log_to_file(self.settings)
        self._http = server = _HTTPServer(self, host, port)
        address = server.server_address[:2]
        try:
            server.start()
        except RuntimeError:
            server.server_close()
            self._http = None
            raise
        return address

    def stop(self):
        """停止服务:不再接受,等正在回答、正在发送的,最多 ``stop_within`` 秒。WSGI 的进程结束以前也调用它。"""
        deadline = time.monotonic() + self.stop_within
        server, self._http = self._http, None
        if server:
            server.close(deadline)
        self.finish(deadline)

    def run(self, host='0.0.0.0', port=8000, debug=False, threaded=True):
        """服务到 `stop()`、SIGTERM 或 Ctrl-C 为止;在任何线程里都行(信号只在主线程里接)。

        ``debug`` 见 `debug` 属性;``threaded`` 只为旧程序保留,总是多线程。
        """
        self.debug = bool(debug)
        _one_heap()
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
            while self._http:
                time.sleep(0.2)
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
    _one_heap()
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
    reply = _probe(url, app.settings, _decoded(args.probe))[1]
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


def _show_progress(sent, total):
    print('\r%d%%' % (100 * sent // total), end='\n' if sent >= total else '', file=sys.stderr,
          flush=True)


def _run_send(args):
    if args.send == '-':
        data = sys.stdin.buffer.read(_XML_SIZE + 1)
        if len(data) > _XML_SIZE:
            raise _CommandError(2, 'more than 1 MiB on standard input: --send-file takes a file')
        message = data.decode('utf-8', 'replace').strip('\r\n')
        if not message:         # cron:没有输出就没有消息
            return
    else:
        message = _decoded(args.send or '')
        if not message and args.send_file is None:
            raise _CommandError(2, 'nothing to send')
    if args.send_file is not None:
        import pathlib
        message = pathlib.Path(args.send_file)
    elif args.markdown:
        message = {'msgtype': 'markdown', 'markdown': {'content': message}}
    if args.robot and (args.party or args.tag):
        raise _CommandError(2, '--party and --tag do not go with --robot')
    sender = WeChatRobot(None, args.app, args.config) if args.robot \
        else WeChatClient(args.app, args.config)
    sender.retry_within = args.retry
    if sys.stderr.isatty():
        sender.progress = _show_progress
    if args.robot:
        sender.send(message, args.to)
    else:
        sender.send(message, args.to, args.party, args.tag)


#: 键 → (该是什么样,一句话,在后台的哪一页)。
_SHAPES = {
    'corpid': ('w[wx][0-9A-Za-z]{16}', 'ww 开头,18 个字符', '我的企业 → 企业信息'),
    'agentid': ('[0-9]{1,18}', '一个数字', '应用管理 → 自建 → 应用'),
    'secret': ('[0-9A-Za-z_-]{43}', '43 个字符', '应用管理 → 自建 → 应用'),
    'token': ('[0-9A-Za-z]{1,32}', '至多 32 个字母和数字', '应用 → 接收消息 → 设置API接收'),
    'encoding_aes_key': ('[0-9A-Za-z]{43}', '恰好 43 个字母和数字', '应用 → 接收消息 → 设置API接收'),
    'touser': (r'@all|[0-9A-Za-z][0-9A-Za-z_@.|-]*', '「账号」,几个用 | 隔开', '通讯录 → 成员'),
    'robot': (r'[0-9a-f-]{36}|https://\S+[?&]key=[0-9a-f-]{36}\S*', 'Webhook 地址,或其中的 key', '群 → 消息推送'),
}


def _check_settings(settings):
    """设置的每个键 → (好不好,None 是用不着就算了, 一句话) (生成器)。"""
    for key, (form, rule, page) in _SHAPES.items():
        value = settings[key]
        if not value:
            wanted = key == 'corpid' and not settings['robot']
            yield False if wanted else None, '%s 没有写(「%s」)' % (key, page)
        elif re.fullmatch(form, value):
            yield True, '%s,来自 %s' % (key, settings.sources[key])
        else:
            odd = '里面有空白、全角或看不见的字符:' if re.search('[^!-~]', value) else ''
            yield False, '%s (来自 %s) 不像:%s应该是%s,现在有 %d 个字符;照「%s」重新抄' % (
                key, settings.sources[key], odd, rule, len(value), page)
    for source in sorted(set(settings.sources.values()) - {None}):
        path = source.rpartition(' [')[0]
        if path and os.name == 'posix' and os.stat(path).st_mode & 0o077:
            yield False, '%s 别人也能读:chmod 600 它' % path


def _check_network(client):
    """从 DNS 到可信 IP,一步一步 → (好不好, 一句话) (生成器);前一步不通就停。"""
    import email.utils
    host = urllib.parse.urlsplit(client.api_base)
    if not any(name.lower() in ('https_proxy', 'http_proxy', 'all_proxy') for name in os.environ):
        try:
            found = socket.getaddrinfo(host.hostname, host.port or 443, 0, socket.SOCK_STREAM)
            yield True, 'DNS:%s 是 %s' % (host.hostname, found[0][4][0])
        except OSError as e:
            yield False, 'DNS 查不到 %s (%s):看网络,或 api_base' % (host.hostname, e)
            return
    try:
        date = client._request('gettoken', {}, consume=lambda _, response: {
            'date': response.headers.get('Date')})['date']
        yield True, '连上了 %s%s' % (host.netloc, ',证书有效' * (host.scheme == 'https'))
        with contextlib.suppress(TypeError, ValueError):
            ahead = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
            yield abs(ahead) < 60, '时钟与企业微信差 %.0f 秒%s' % (
                ahead, '' if abs(ahead) < 60 else ':校时 (NTP)')
        client._fetch_token()
        yield True, 'corpid 和 secret 正确 (gettoken)'
        if client.settings['agentid']:
            agent = client.call('agent/get', agentid=client.settings['agentid'])
            yield True, '应用「%s」可以调用,出口 IP 可信' % _show(agent.get('name', ''))
    except APIError as e:
        yield False, str(e)


def _run_check(args):
    settings = get_config(args.app, args.config)
    findings = _check_settings(settings)
    if settings['corpid'] and settings['secret']:
        findings = itertools.chain(findings, _check_network(WeChatClient(settings)))
    bad = 0
    for good, text in findings:
        print('%s %s' % ({True: '✓', False: '✗', None: '–'}[good], text), flush=True)
        bad += good is False
    if bad:
        raise _CommandError(1, '%d to mend' % bad)


def _parser():
    import argparse
    parser = argparse.ArgumentParser(prog='easywechat.py', add_help=False,
                                     description='企业微信机器人,一个 Python 文件。')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--echo', action='store_true', help='启动一个原样回话的机器人')
    what.add_argument('--probe', metavar='TEXT', help='扮演企业微信:校验、投递 TEXT、打印回复')
    what.add_argument('--send', metavar='TEXT', help='发一条文本;- 是从标准输入读,空的就不发')
    what.add_argument('--send-file', metavar='PATH', help='发一个文件(图片、语音、视频按后缀)')
    what.add_argument('--check', action='store_true', help='配置和网络哪里不对,到哪里改')
    what.add_argument('--init', action='store_true',
                      help='写一个 config.ini,其中有新的 Token 和 EncodingAESKey')
    what.add_argument('--version', action='version', version=__version__, help='打印版本')
    what.add_argument('-h', '--help', action='help', help='打印这段说明')
    parser.add_argument('--host', help='监听的地址(默认 0.0.0.0;没有 config.ini 时 127.0.0.1)')
    parser.add_argument('--port', type=int, default=8000, help='端口(默认 8000)')
    parser.add_argument('--app', default='demo', help='config.ini 里的节名(默认 demo)')
    parser.add_argument('--config', metavar='FILE', help='config.ini 的路径')
    parser.add_argument('--url', help='--probe 的目标(默认本机)')
    parser.add_argument('--to', metavar='USER', help='发给谁,几个用 | 隔开(默认配置里的 touser);--robot 时是 @ 谁')
    parser.add_argument('--party', help='发给哪些部门,几个用 | 隔开')
    parser.add_argument('--tag', help='发给哪些标签,几个用 | 隔开')
    parser.add_argument('--markdown', action='store_true', help='TEXT 是 markdown')
    parser.add_argument('--robot', action='store_true', help='用群机器人发;key 在配置的 robot 里')
    parser.add_argument('--retry', metavar='SECONDS', type=float, default=0,
                        help='连不上时一直试到这么多秒')
    parser.add_argument('--debug', action='store_true', help='回调出错时把原因回给用户')
    return parser


def main(argv=None):
    """命令行;返回退出码 (int)。"""
    args = _parser().parse_args(argv)
    try:
        if not 0 <= args.port <= 65535:
            raise _CommandError(2, 'no port: %d' % args.port)
        run = (_run_echo if args.echo else _run_init if args.init else _run_check if args.check
               else _run_send if args.probe is None else _run_probe)
        run(args)
        return 0
    except _CommandError as e:
        code, text = e.args
    except APIError as e:
        code, text = (3 if isinstance(e, NetworkError) else 1), e
    except (WeChatError, ImportError) as e:
        code, text = (1 if isinstance(e, CryptoError) else 2), getattr(e, 'errmsg', e)
    except OSError as e:
        code, text = 2, '%s: %s' % (e.filename, e.strerror)
    except (TypeError, ValueError) as e:
        code, text = 2, e
    except KeyboardInterrupt:
        code, text = 130, 'interrupted'
    print('easywechat: %s' % text, file=sys.stderr)
    return code


if __name__ == '__main__':
    sys.modules.setdefault('easywechat', sys.modules[__name__])
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    elif sys.stdout:                        # Python 3.6
        sys.stdout = open(sys.stdout.fileno(), 'w', encoding=sys.stdout.encoding,
                          errors='backslashreplace', buffering=1, closefd=False)
    sys.exit(main())
