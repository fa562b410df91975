#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""EasyWeChat 0.2.0（2026-11-27）：一个 Python 文件，把机器人接到企业微信 (WeCom)。

这个文件是哪一版、改过没有：``python easywechat.py --version`` 打印版本、日期和 SHA-256，与仓库里同一版的比。
（与同名的 PHP SDK 无关。）把它复制到自己的项目里，写一个函数，就有了会自动回复的机器人：

    import easywechat

    def reply_func(param_dict):             # 企业微信发来的消息，一个普通的 dict
        return param_dict                   # 原样返回；也可以返回 '一句话'

    server = easywechat.WeChatServer('demo')        # 读 config.ini 的 [demo]
    server.register_callback('text', reply_func)
    server.run(host='0.0.0.0', port=8000)

发一条消息更短，命令行上也行，``df -h | python easywechat.py --send -``：

    easywechat.WeChatClient('demo').send('磁盘 91%')

家里没有公网地址也行：config.ini 里写智能机器人的 bot_id 和 bot_secret，程序不用改一个字，什么包都不装。

只用标准库；听回调 URL、下载智能机器人收到的文件，另需 pycryptodome 里的 AES。没有账号也能先看一眼：
``python easywechat.py --echo``。

从上往下读，每一节只用上面讲过的东西：

    错误 → 错误码 → 日志 → XML → 加解密 → 配置 → 线程 → 存储 → 消息 → 请求 → 主动模式
         → 回调 → 一次 → 答复 → 回调模式 → 服务器 → 信 → 长连接 → 本机 → 智能机器人 → 气泡 → 总成 → 命令行

    企业微信 ──HTTP──▶ http.server 外壳 ┐            ┌──────────┐   ┌──────┐
    gunicorn ──WSGI──▶ server(environ, …)┼▶ Dispatcher┤ 一次 Once ├──▶│ 回调 ├─▶ 你的函数 (dict)
    Flask 视图、测试 ───────────────────┘ 信封进、信封出└─▲──┬─────┘   └──────┘        │
    企业微信 ◀─WebSocket─▶ 智能机器人 ──────────────────┘  ▼                         ▼
                                   答复：被动回复 · 主动发送 · 气泡 ◀─ str | dict | Path | list | 生成器 | Stream
"""

import binascii
import codecs
import collections
import contextlib
import copy
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import importlib
import io
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
import weakref

try:
    import xml.etree.ElementTree as ET
except ImportError:             # OpenWrt 没装 python3-xml：只发消息、只连长连接，用不着它
    ET = None                   # type: ignore[assignment]

try:
    import logging
    logger = logging.getLogger('easywechat')

    class _OnStderr(logging.StreamHandler):
        """程序自己没有管日志：警告以上的写到 stderr，带着时间和级别。"""
        def emit(self, record):
            if not logging.root.handlers and logger.handlers[0] is self and type(logger.handlers[-1]) is type(self):
                self.stream = sys.stderr
                super().emit(record)
    _handler = _OnStderr()
    _handler.setLevel(logging.WARNING)
    _handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s', '%Y-%m-%d %H:%M:%S'))
    logger.addHandler(_handler)
except ImportError:             # OpenWrt 没装 python3-logging：警告以上写到 stderr
    class _Stderr:              # 与 logging.Logger 同名的几个方法，只此而已
        debug = info = staticmethod(lambda msg, *args: None)
        warning = error = exception = staticmethod(lambda msg, *args: print(
            'easywechat: ' + (msg % args if args else msg), file=sys.stderr))
    logger, logging = _Stderr, None     # type: ignore[assignment]

# OpenWrt 没装 python3-codecs 时没有 idna，连 IP 地址都查不了；这个排在标准的后面，有它就轮不到。
codecs.register(lambda name: None if name != 'idna' else codecs.CodecInfo(
    codecs.ascii_encode, codecs.ascii_decode, name='idna'))

#: 对象 → {属性：怎样造}：锁、计数、名单，每个进程一份。fork 出来的进程里没有别的线程，它们拿着的锁再也放不开。
_per_process: 'weakref.WeakKeyDictionary[Any, Any]' = weakref.WeakKeyDictionary()
_process = [os.getpid()]


def _fresh(thing, **attributes):
    """给 ``thing`` 这些属性，现在一次，以后每次 fork 出来的进程里一次。"""
    _per_process[thing] = attributes
    for name, make in attributes.items():
        setattr(thing, name, make())


def _check_fork():
    """fork 以后的第一件事。3.7 起由 Python 来叫；3.6 没有这个，由各个入口来问。"""
    if _process[0] != os.getpid():
        _process[0] = os.getpid()
        for thing, attributes in list(_per_process.items()):
            _fresh(thing, **attributes)


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_check_fork)

__version__, __date__ = '0.2.0', '2026-11-27'
_FILE = os.path.abspath(__file__)      # 以后也许换了当前目录

__all__ = ['WeChatServer', 'WeChatClient', 'WeChatRobot', 'WeChatBot', 'get_sender', 'Dispatcher', 'WXBizMsgCrypt',
           'MemoryStore', 'FileStore', 'Stream', 'xml_to_dict', 'dict_to_xml', 'json_to_dict', 'get_config',
           'get_section', 'state_folder', 'plain_text', 'fetch', 'command', 'ierror', 'WeChatError', 'CryptoError',
           'FormatException', 'ConfigError', 'APIError', 'NetworkError']

# 注解写成字符串，只给类型检查器和编辑器：运行的时候不导入 typing。没有注解的是这个文件自己的。
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-any-generics
# mypy: no-check-untyped-defs, no-warn-return-any
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import (
        AbstractSet, Any, AsyncIterable, AsyncIterator, Awaitable, BinaryIO, Callable, Deque, Dict, Iterable, Iterator,
        List, Mapping, NoReturn, Optional, Sequence, Set, Tuple, TypeVar, Union, overload)
    from typing_extensions import ParamSpec
    from pathlib import Path
    Message = Dict[str, Any]            # 收到的消息，企业微信的回答
    Who = Union[None, str, int, Sequence[object], AbstractSet[object]]
    File = Union[str, bytes, os.PathLike[str], BinaryIO]        # 路径；文件对象，bytes 要另给名字
    Sendable = Union[None, str, Mapping[str, Any], os.PathLike[str], BinaryIO, 'Stream', Sequence['Sendable'],
                     Iterator['Sendable']]
    # 回调返回的
    Result = Union[Sendable, Sequence['Result'], Iterator['Result'], Awaitable['Result'], AsyncIterator['Result']]
    Function = TypeVar('Function', bound=Callable[..., Result])
    HTTPAnswer = Tuple[int, List[Tuple[str, str]], bytes]
    Spawn = Optional[Callable[..., bool]]
    P = ParamSpec('P')


# ---- 错误 Errors ------------------------------------------------------------------------------
# 会出什么错，全在这里。里面的代码一律抛异常；异常知道 HTTP 该答什么，外壳照抄。
# 对外，验签以后的失败看上去都一样（403，没有正文）；是哪一种、该改哪里，只写在日志里。

class ierror:
    """官方 WXBizMsgCrypt 的返回码（开发者文档 path/90968「加解密方案说明」）。"""
    WXBizMsgCrypt_OK = 0
    WXBizMsgCrypt_ValidateSignature_Error = -40001
    WXBizMsgCrypt_ParseXml_Error = -40002
    WXBizMsgCrypt_ComputeSignature_Error = -40003
    WXBizMsgCrypt_IllegalAesKey = -40004
    WXBizMsgCrypt_ValidateCorpid_Error = -40005
    WXBizMsgCrypt_EncryptAES_Error, WXBizMsgCrypt_DecryptAES_Error = -40006, -40007
    WXBizMsgCrypt_IllegalBuffer = -40008
    WXBizMsgCrypt_EncodeBase64_Error, WXBizMsgCrypt_DecodeBase64_Error = -40009, -40010
    WXBizMsgCrypt_GenReturnXml_Error = -40011


#: errcode →（HTTP 状态，一句话：违反了哪条规则，该改哪里）。正数就是 HTTP 状态本身。
_ERRORS = {
    -40001: (403, 'signature differs：Token 与后台的不一致，两边改成一样'),
    -40002: (400, 'no envelope：正文不是企业微信的信封（<xml> 里一个 <Encrypt>，或 {"encrypt": "…"}）'),
    -40003: (500, 'cannot sign：nonce 是 1 到 63 个可见的 ASCII 字符，timestamp 是 10 位数字'),
    -40004: (500, 'EncodingAESKey 应该恰好是 43 个字母和数字，到后台重新复制'),
    -40005: (403, 'receive id differs：corpid 与发来的企业不一致，到「我的企业 → 企业信息」核对'),
    -40006: (500, 'cannot encrypt：不是文字'),
    -40007: (403, 'bad padding：EncodingAESKey 与后台的不一致，两边改成一样'),
    -40008: (403, 'no message：解密了，里面不是一条消息，长度不对'),
    -40009: (500, 'cannot encode：不能写成 base64'),
    -40010: (403, 'not base64：反向代理截断了查询参数或正文，或改了里面的 +'),
    -40011: (500, 'cannot write XML：这些内容写不成 XML'),
    400: (400, 'not HTTP：不合 RFC 9112'), 404: (404, 'wrong path：路径不对'),
    405: (405, 'wrong method：只有 GET、HEAD、POST'), 411: (411, 'no Content-Length：POST 要写正文的长度'),
    413: (413, 'body too large：正文太大'), 414: (414, 'request line too long：请求行太长'),
    431: (431, 'too many header fields：头部太多或太长'), 500: (500, 'internal error：这个文件自己的错'),
    503: (503, 'no answer in time：没有及时答复'),
}


class WeChatError(Exception):
    """本模块所有错误的祖先。

    ``errcode`` (int) 是官方返回码或 HTTP 状态，``errmsg`` (str) 是一句话，
    ``status`` 是 HTTP 状态。
    """

    errcode: int
    errmsg: str

    def __init__(self, errcode: int, errmsg: 'Optional[str]' = None) -> None:
        super().__init__(errcode, errmsg or _ERRORS.get(errcode, (500, '没有说原因'))[1])
        self.errcode, self.errmsg = self.args

    def __str__(self) -> str:
        return '%s (%d)' % (self.errmsg, self.errcode)

    @property
    def status(self) -> int:
        """回给对方的 HTTP 状态。"""
        return _ERRORS.get(self.errcode, _ERRORS[500])[0]


class CryptoError(WeChatError):
    """验签、加密或解密失败；``errcode`` 是 `ierror` 里的一个。"""


class FormatException(WeChatError):
    """读不懂的 XML、JSON (-40002)，写不成 XML 的内容 (-40011)，不像样的
    EncodingAESKey (-40004)。
    """


class ConfigError(WeChatError):
    """配置缺了什么或写错了；``errcode`` 是命令行的退出码 2。"""
    def __init__(self, errmsg: str) -> None:
        super().__init__(2, errmsg)

    def __str__(self) -> str:
        return self.errmsg


# ---- 错误码 Codes -----------------------------------------------------------------------------
# 企业微信说了什么（path/90313），该怎么办。

#：（错误码，原因，怎么办），管理后台的说法。README「出错了？」的表由它生成。
_CATALOGUE = (
    ((-1,), '企业微信系统繁忙', '已经试过几次；过一会儿再发'),
    ((40001,), 'Secret 不对，或 access_token 作废了',
     '到「应用管理 → 自建 → 应用」重新查看 Secret；要和 corpid 是同一个企业，应用没有停用'),
    ((40003, 46004, 60111), 'UserID 不对，没有这个成员', '用「通讯录 → 成员」里的「账号」，不是姓名'),
    ((40004, 40005), '媒体类型或文件类型不对', '图片 JPG、PNG，语音 AMR，视频 MP4，别的当作 file 发'),
    ((40006, 40009, 40011, 45001), '文件大小不对', '大于 5 字节；图片 10 MB、语音 2 MB、视频 10 MB、文件 20 MB 以内'),
    ((40007,), 'media_id 不对或过期', '三天有效，只在上传它的企业里能用：再上传一次'),
    ((40008,), 'msgtype 不对', '类型见 README 的「主动模式」；markdown_v2 只有群机器人能发'),
    ((40013,), '企业ID 不对', '「我的企业 → 企业信息」最下面，ww 开头，18 个字符'),
    ((40014, 42001), 'access_token 不对或过期', '已经换过一次新的；看 secret 和 agentid 是不是同一个应用的'),
    (range(40016, 40028), '菜单不对', '一级 1–3 个，二级 1–5 个；名字 16 / 40 字节，key 128 字节，url 1024 字节以内'),
    ((40029, 42003, 42022), '授权码用过或过期了', '一个 code 只能用一次，五分钟有效：重新授权'),
    ((40031, 40032), '成员名单不对或太长', '用 | 隔开，一次最多 1000 个'),
    ((40033,), '含有不允许的字符', '正文要是 UTF-8，不要 \\uXXXX 的转义'),
    ((40035, 40058, 40063), '参数不对', 'errmsg 里有字段的名字；照 path/90236 改'),
    ((40039, 40094, 45034), '网址太长，或没有 http://', '1024 字节以内，写全 http:// 或 https://'),
    ((40050, 86001, 86003, 86008), '群不对', 'chatid 要由这个应用用 appchat/create 建'),
    ((40054, 40055), '菜单的网址不对', '要有 http://，域名在应用的可信域名里'),
    ((40056,), 'AgentId 不对', '「应用管理 → 自建 → 应用」最上面的数字'),
    ((40057,), '回调 URL 不通', '先让程序跑起来再按「保存」；python easywechat.py --probe 能从外面试'),
    ((40066, 40068, 40070, 60003, 60123), '部门或标签不对', '用「通讯录」里的部门 ID、标签 ID（数字）'),
    ((40074,), '图文不能保密', '去掉 safe，或用 mpnews'),
    ((40091,), 'Secret 是别的企业的', 'corpid 和 secret 要从同一个企业的后台抄'),
    ((40123,), '图片坏了', '重新生成 JPG 或 PNG'),
    ((40201, 82004), '内容被拦下了', '换一种写法'),
    ((41001,), '没有 access_token', '中转 (api_base) 丢了查询参数：让它原样转发'),
    ((41002, 41004), '没有 corpid 或 secret', '写进 config.ini；若已写了，是中转 (api_base) 丢了查询参数'),
    ((41006, 41009, 41011, 41016, 41033), '少了字段', 'errmsg 里有名字；agentid 在 config.ini 里写'),
    ((*range(42014, 42022), *range(42023, 42052)), '模板卡片不对', '照 path/90236 改；errmsg 说是哪个字段'),
    ((43004,), '成员没有绑定微信插件', '「我的企业 → 微信插件」扫码'),
    ((43009,), '企业没有认证', '「我的企业 → 企业信息」里认证'),
    ((43012,), '应用没有回调 URL', '按钮、投票的卡片要先「设置API接收」'),
    ((44001, 44004), '文件或正文是空的', '文件要大于 5 个字节，正文至少一个字'),
    ((45002,), '正文太长', 'text 和 markdown 2048 字节以内（群机器人的 markdown 4096）'),
    ((45007, 45008, 45032), '语音、图文或作者超长', '语音 60 秒，图文 8 条，作者 64 字节以内'),
    ((45009, 45033), '发得太多、太快',
     '按分钟的限制等 60 秒，按小时的等一小时，按天的等到次日零点；群机器人每分钟 20 条'),
    ((45024, 45029), '超过账号数，或回答太大', '缩小范围，分几次'),
    ((45031,), 'Secret 不够安全', '「应用管理 → 自建 → 应用」里重置 Secret'),
    ((46003,), '还没有菜单', '先用 menu/create 建'),
    ((48001, 48002, 48004, 48005), '没有权限用这个 API', '看这个 API 的「权限说明」：应用的类型、可见范围'),
    ((48006,), '应用太久没用，权限收回了', '管理员到「应用管理 → 自建 → 应用」重新启用'),
    ((48009,), '通讯录同步不让新 IP 读', '改用自建应用的 Secret'),
    ((49008,), '群解散了', '另建一个群'),
    ((50001, 80001, 85004, 85005, 85008, 85111), '可信域名不对', '「应用 → 网页授权及JS-SDK」里一字不差，已备案'),
    ((50002, 60011, 60021), '不在可见范围里', '「应用管理 → 自建 → 应用 → 可见范围」里加上'),
    ((50003,), '应用停用了', '「应用管理 → 自建 → 应用」里启用'),
    ((60020,), '出口 IP 不可信',
     '把 {ip} 加到「应用管理 → 自建 → 应用 → 企业可信IP」，约一分钟生效；没有固定 IP 就用中转 (api_base) 或群机器人'),
    ((60140,), 'response_code 用过或过期了', '一个只能用一次：等下一次点击'),
    ((81012, 82001), '没有写收件人', '给 to、party 或 tag，或在 config.ini 里写 touser'),
    ((81013,), '收件人都不对，或都不在可见范围里', '「账号」写对；「应用管理 → 自建 → 应用 → 可见范围」里加上他'),
    ((82002, 82003), '部门或标签太多', '一次最多 100 个'),
    ((86004, 86005, 86006, 86007, 86215, 86220), '建群的参数不对', '2 到 2000 个成员，群主在内，chatid 没有用过'),
    (range(90200, 90209), '小程序通知不对', '小程序要绑定到应用；字段的长度见 path/90236'),
    ((93000,), '群机器人的 key 不对，或机器人已移除', '在群里重新添加，抄新的 Webhook 地址'),
    ((93004, 93005, 93008), '群机器人停用了，或不在群里', '在群里重新启用、添加'),
    ((301002,), 'agentid 和 secret 不是同一个应用的', '「应用管理 → 自建 → 应用」里两样一起抄'),
    ((301019,), '图片的 md5 不对', '让 WeChatRobot 来算：send(Path(...))'),
    ((6000,), '同一条消息的两帧撞上了', '已经重试过；过一会儿再试'),
    ((93001, 93006), '会话不对，或还没有跟机器人说过话',
     '先跟机器人说一句话，群里 @ 它；to 写 userid 或群的 chatid，运行着的机器人收到第一条消息时会打印'),
    ((93019,), '没有这个 BotID', '「智能机器人 → API 模式 → 长连接」里把 BotID 和 Secret 一起复制'),
    ((600039, 846605), '这条消息已经不能回复了', '连接断过，或太久了：改为主动发送'),
    ((846607,), '回复得太快', '每分钟 30 条、每小时 1000 条以内'),
    ((846608,), '气泡太久了', '开始以后 6 分钟以内要写完：其余的主动发送'),
    ((846609,), '长连接没有订阅', '会自己再连'),
    ((853000,), '长连接的 Secret 不对',
     '「智能机器人 → API 模式 → 长连接」里的 Secret，不是应用的 Secret，也不是 MCP 的 apikey'),
    ((830001, 830002, 830003), '从网址上传失败', '对方的服务器要支持 Range,200 MB 以内'),
)


def _advice(errcode, errmsg):
    for codes, cause, advice in _CATALOGUE:
        if errcode in codes:
            ip = re.search('from ip: ?([0-9a-fA-F.:]+)', errmsg)
            return '%s：%s' % (cause, advice.replace('{ip}', ip.group(1) if ip else '出口 IP'))
    return ''


class APIError(WeChatError):
    """企业微信拒绝了一次调用。

    ``errcode`` 和 ``errmsg`` 是它的原话（path/90313），``path`` (str) 是
    API，例如 'message/send', ``hint`` (str) 是出了什么事、该怎么办。``str()``
    先说它，再在括号里说原话和错误码。
    """

    path: str
    hint: str

    def __init__(self, errcode: int, errmsg: str, path: str = '', hint: 'Optional[str]' = None) -> None:
        super().__init__(errcode, errmsg)
        self.path = path
        self.hint = _advice(errcode, self.errmsg) if hint is None else hint

    def __str__(self) -> str:
        text = '%s%s, %d' % (self.path and self.path + ': ', self.errmsg, self.errcode)
        return '%s（%s）' % (self.hint, text) if self.hint else text


class NetworkError(APIError):
    """没有得到企业微信的回答。``errcode``：503 没有连上，504 没有完整的回答，502
    回答的不是企业微信。

    ``maybe_sent`` 为真时请求可能已经到了，重发可能成了两条。
    """

    def __init__(self, errcode: int, errmsg: str, path: str = '', hint: str = '', maybe_sent: bool = False) -> None:
        super().__init__(errcode, errmsg + '; it may have been delivered' * maybe_sent, path, hint)
        self.maybe_sent = maybe_sent


# ---- 日志 Log ---------------------------------------------------------------------------------
# 外来的文字进日志、进错误，只有一扇门 (_show)：抹掉密钥，截短，转义。拒绝请求的日志有上限。

#: 控制字符、行分隔符、代理项，和 Unicode 的 Default_Ignorable：零宽的、从右到左的、看不见的。
_UNPRINTABLE = re.compile(
    '[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f'
    '\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]')
#: 网址里的：查询参数，用户名和密码。
_SECRET = re.compile(r'((?:access_token|corpsecret|secret|key|response_code)=)[^&\s"\'<>]+|(//)[^/\s@]+(?=@)')
#: 密钥的字与字之间可能有的：换行、空白、看不见的，也可能已经写成转义。
_GAP = r'(?:[^!-~]|\\{1,4}(?:[abfnrtv0]|x[0-9a-f]{2}|u[0-9a-f]{4}))'
#: 用过的密钥，一直记着；用过的 access_token，最近的一百个。都从错误和日志里抹掉。
_secrets: 'Set[str]' = set()
_tokens: 'Deque[str]' = collections.deque(maxlen=100)


def _remember(*secrets):
    """这些密钥从此不进错误和日志；太短的不算，不然什么字都成了星号。"""
    _secrets.update(secret for secret in secrets if len(secret) > 5)


def _redact(text):
    """去掉网址里的密钥，和每一个用过的密钥，即使中间换了行。"""
    bare = re.sub(_GAP + '+', '', text)
    for secret in sorted(_secrets.union(_tokens), key=len, reverse=True):
        if secret in bare:
            text = re.sub((_GAP + '*').join(map(re.escape, secret)), '***', text)
    return _SECRET.sub(r'\1\2***', text)


def _escape(text):
    return _UNPRINTABLE.sub(lambda m: ('\\u%04x' if m.group() <= '\uffff' else '\\U%08x') % ord(m.group()), text)


def _show(value, limit=200):
    """外来的文字进日志以前：没有密钥，截短，控制字符写成转义，伪造不了日志行，也动不了终端。"""
    text = _redact(str(value)[:limit + 2000])
    return _escape(text if len(text) <= limit else text[:limit] + '...')


class _Shown:
    """`_show`，真的要写日志的时候才做。"""
    def __init__(self, value):
        self._value = value

    def __str__(self):
        return _show(self._value, 2000)


def _decoded(text):
    """命令行参数或文件名；LANG=C 时没有按 UTF-8 解码的，在这里解码。"""
    if re.search('[\udc80-\udcff]', text):
        text = os.fsencode(text).decode('utf-8', 'replace')
    return text


def _traceback():
    """当前异常的 traceback，每行缩进、转义：里面可能有用户发来的字。"""
    import traceback
    return ''.join('\n    ' + _escape(line) for line in _redact(traceback.format_exc()).splitlines())


def _mask(text):
    """认得出、但不完整的标识，例如 'ww58...c7'。"""
    return text[:4] + '...' + text[-2:] if len(text) > 8 else '...'


class _RefusalLog:
    """拒绝的日志：每个地址、所有地址，一分钟最多几行，其余的只计数，一分钟后说总数。"""
    lines, total, addresses = 10, 100, 1000  #: 一个地址、一共每分钟几行；最多记多少个地址，再多的合在一起。

    _clock = staticmethod(time.monotonic)

    def __init__(self):
        self._since = self._clock()
        self._count, self._written = collections.Counter(), 0       # 地址 → 几次；写了几行
        _fresh(self, _lock=threading.Lock)

    def write(self, client, error):
        with self._lock:
            count, left = {}, 0
            if self._clock() - self._since >= 60:       # 一分钟过去了：说没写出来的数目，重新计数
                count, left = self._count, sum(self._count.values()) - self._written
                self._count, self._written, self._since = collections.Counter(), 0, self._clock()
            if client not in self._count and len(self._count) >= self.addresses:
                client = 'other addresses'
            self._count[client] += 1
            shown = self._count[client] <= self.lines and self._written < self.total
            self._written += shown
            last = self._count[client] == self.lines or self._written == self.total
        if left:
            logger.warning('refused %d more：一分钟里又拒绝了这么多次，来自 %d 个地址：%s', left, len(count), ', '.join(
                '%s (%d)' % (_show(who), n) for who, n in count.most_common(5)))
        if shown:
            logger.warning('refused %s with %d: %s%s', _show(client) or '一个请求', error.status,
                           _show(error.errmsg, 400), '（再有的只计数）' * last)


# ---- XML --------------------------------------------------------------------------------------
# 企业微信的消息：<xml><MsgType><![CDATA[text]]></MsgType><Content>…</Content>…</xml>(path/90239)。
# 读：根去掉；没有子元素的是 str（从不转换，007 还是 007），有的是 dict，同名的兄弟是 list。
# 写：反过来。文字进 CDATA，list 写成同名的兄弟。XML 1.0 不许的字符，两个方向都去掉。

_XML_SIZE, _XML_DEPTH, _XML_ELEMENTS = 1 << 20, 16, 20000  #: 一个文档最多多少字符、多少层、多少个元素。

_NOT_XML = re.compile('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')
# DTD 只可能出现在根元素以前，所以只要以根元素开头（至多先有一个声明），就没有实体可展开。
_BEGINS_WITH_ROOT = re.compile(r'(?:<\?xml\s[^<>]*\?>\s*)?<[^!?]')
_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]{0,127}')


def _xml_chars(text):
    """去掉 XML 1.0 不许的字符。它们都不可打印，所以多数文字看一眼就过了，不用正则。"""
    return text if text.isprintable() else _NOT_XML.sub('', text)


class _DictBuilder:
    """`ET.XMLParser` 的 target：一边解析一边生成 dict，超过限制就停。"""
    def __init__(self):
        self._open = [{}]       # 整个文档、外层到内层的元素，各是它的 dict；没有子元素的是空的
        self._text, self._count = [], 0
        self.data = self._text.append       # data(text)，expat 每读到一段文字

    def start(self, tag, attributes):
        self._count += 1
        if self._count > _XML_ELEMENTS or len(self._open) > _XML_DEPTH:
            raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error, 'cannot read XML：多于 %d 个元素，或 %d 层'
                                  % (_XML_ELEMENTS, _XML_DEPTH))
        self._open.append({})
        self._text.clear()                  # 子元素之间的空白只是排版

    def end(self, tag):
        value = self._open.pop() or ''.join(self._text)
        self._text.clear()
        siblings = self._open[-1]
        if tag not in siblings:
            siblings[tag] = value
        elif isinstance(siblings[tag], list):
            siblings[tag].append(value)
        else:
            siblings[tag] = [siblings[tag], value]

    def close(self):
        root, = self._open[0].values()      # 没有根，或不止一个，expat 不会走到这里
        return root if isinstance(root, dict) else {}


def _need_xml():
    if ET is None:
        raise ImportError('收应用的消息要读 XML，这个 Python 没有：opkg install python3-xml')


def _parse_xml(text):
    """解析一次；不以根元素开头的抛 `ValueError`。"""
    text = text.lstrip('\ufeff \t\r\n')
    if not _BEGINS_WITH_ROOT.match(text):
        raise ValueError('不以根元素开头')
    parser = ET.XMLParser(target=_DictBuilder(), encoding='utf-8')
    parser.feed(text.encode('utf-8'))
    return parser.close()


def xml_to_dict(text: 'Union[str, bytes]') -> 'Message':
    """把一个 XML 文档（str，或 UTF-8 的 bytes）读成 dict。

    >>> xml_to_dict('<xml><Content><![CDATA[007]]></Content><Item>a</Item><Item>b</Item></xml>')
    {'Content': '007', 'Item': ['a', 'b']}

    最多 1 MiB、16 层、20000 个元素，不许有 DTD；读不懂的抛 `FormatException`
    (-40002)。
    """
    _need_xml()
    try:
        if isinstance(text, bytes):
            text = text.decode('utf-8')
        if len(text) > _XML_SIZE:
            raise ValueError('多于 %d 个字符' % _XML_SIZE)
        try:
            return _parse_xml(text)
        except (ET.ParseError, ValueError):     # 也许只是有 XML 1.0 不许的字符：expat 遇到就停
            cleaned = _NOT_XML.sub('', text)
            if cleaned == text:
                raise
            return _parse_xml(cleaned)
    except (ET.ParseError, ValueError, LookupError, RecursionError, MemoryError) as e:
        raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error, 'cannot read XML：%s' % _show(e)) from None


@functools.lru_cache(maxsize=500)       # 来来去去就那几个名字
def _check_name(name):
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error,
                              'cannot write XML：%s 不能做元素的名字' % _show(repr(name)))


def _write_element(name, value, depth):
    _check_name(name)
    if isinstance(value, str):
        return '<%s><![CDATA[%s]]></%s>' % (name, _xml_chars(value).replace(']]>', ']]]]><![CDATA[>'), name)
    if isinstance(value, int):
        return '<%s>%s</%s>' % (name, str(value).lower() if isinstance(value, bool) else '%d' % value, name)
    if isinstance(value, dict) and depth <= _XML_DEPTH:
        return '<%s>%s</%s>' % (name, ''.join([_write_element(k, v, depth + 1) for k, v in value.items()]), name)
    if isinstance(value, (list, tuple)) and depth <= _XML_DEPTH:
        return ''.join([_write_element(name, item, depth + 1) for item in value])
    raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error, 'cannot write XML：%s 应该是 str、int、bool、'
                          'dict 或 list，至多 %d 层，得到的是 %s' % (name, _XML_DEPTH, type(value).__name__))


def dict_to_xml(data: 'Message') -> str:
    """`xml_to_dict` 的反函数：dict → 以 ``<xml>`` 为根的文档 (str)。

    >>> dict_to_xml({'Content': '<b>', 'CreateTime': 1700000000})
    '<xml><Content><![CDATA[<b>]]></Content><CreateTime>1700000000</CreateTime></xml>'

    值可以是 str、int、bool、dict、list；别的，或不能做元素名的键，抛
    `FormatException` (-40011)。
    """
    if not isinstance(data, dict):
        raise FormatException(ierror.WXBizMsgCrypt_GenReturnXml_Error, 'cannot write XML：应该是 dict，得到的是 %s'
                              % type(data).__name__)
    return _write_element('xml', data, 1)


def _number(text):
    if len(text) > 40:
        raise ValueError('数字有 %d 位' % len(text))
    return float(text) if text.strip('-0123456789') else int(text)


_JSON = json.JSONDecoder(strict=False, parse_int=_number, parse_float=_number, parse_constant=int)


def json_to_dict(data: bytes) -> 'Message':
    """外来的 JSON 文档 (UTF-8 的 bytes) → dict；读不懂、不是对象、超过 64 层、数
    字超过 40 位，抛 `ValueError`。

    >>> json_to_dict(b'{"errcode": 0}')
    {'errcode': 0}
    """
    # 括号先数过：有的 Python 读太深的会崩溃，而不是抛异常。每一步都是线性的。NaN、Infinity 也不是数 (int)。
    depth = 0
    for bracket in () if data.count(b'{') + data.count(b'[') <= 64 else re.findall(
            rb'[][{}]', b''.join(re.sub(rb'(?s)\\.', b'', data).split(b'"')[::2])):
        depth += 1 if bracket in b'[{' else -1
        if depth > 64:
            raise ValueError('多于 64 层')
    value = _JSON.decode(data.decode('utf-8'))
    if not isinstance(value, dict):
        raise ValueError('不是一个对象')
    return value


# ---- 加解密 Crypto ----------------------------------------------------------------------------
# 官方文档 path/90968。密文 = base64(AES-256-CBC(pad32(random(16) + 长度（4，大端）+ msg + receiveid))),
# 密钥 = base64decode(EncodingAESKey + '=')，IV = 密钥的前 16 字节，PKCS#7 以 32 字节为块。
# 签名 = sha1（排序后拼接的 token、timestamp、nonce、密文）。它不绑定各段的边界，所以每段的格式都要严。
# 信封 = <xml>…<Encrypt>密文</Encrypt>…</xml> 或 {"encrypt": "密文"}；未验签的字节不进任何 XML 解析器。

_AES_INSTALL = """收消息要 AES，这个 Python 没有。按系统装一个：
    pip             %s -m pip install pycryptodome
    Debian、Ubuntu  apt install python3-pycryptodome
    Alpine          apk add py3-pycryptodome
    OpenWrt         opkg install python3-cryptodome（25.12 起：apk add python3-cryptodome）
    Entware         opkg install python3-cryptodome""" % (sys.executable or 'python3')

_SIGNATURE = re.compile('[0-9a-f]{40}')
_TIMESTAMP = re.compile('[1-9][0-9]{9}')
_NONCE = re.compile('[!-~]{1,63}')
_ECHO = re.compile('(?![<{])[!-~]{1,64}')       #: 「保存」时要答出去的明文；消息不像这样。
_BASE64 = b'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'


@functools.lru_cache(maxsize=None)
def _aes():
    """AES 模块：pip 的包叫 Crypto，Debian 的叫 Cryptodome；古老的 PyCrypto 也叫 Crypto，不要它。"""
    for package in 'Crypto', 'Cryptodome':
        with contextlib.suppress(ImportError, AttributeError, OSError):     # OSError：别的机器上编译的
            if importlib.import_module(package).version_info >= (3, 4):
                return importlib.import_module(package + '.Cipher.AES')
    raise ImportError(_AES_INSTALL)


def _cut_encrypt(body):
    """从信封 (bytes) 里切出密文 (bytes)：恰好一对 ``<Encrypt>``，有没有 CDATA 都行；或 ``{"encrypt": "…"}``。"""
    begin, end = body.find(b'<Encrypt>'), body.find(b'</Encrypt>')
    try:
        if body.lstrip()[:1] == b'{':
            # 括号和逗号先数过，数字不转换（NaN、Infinity 不收）：多大的垃圾都花不了多少时间
            if body.count(b'{') + body.count(b'[') + body.count(b',') > 64:
                raise ValueError('部分太多')
            data = json.loads(body.decode('utf-8'), parse_int=len, parse_float=len, parse_constant=int)
            return (data.get('encrypt') or data.get('Encrypt')).encode('ascii')
        if not 0 <= begin < end or body.count(b'Encrypt>') != 2:
            raise ValueError('不是恰好一个 Encrypt')
        value = body[begin + 9:end].strip()
        return value[9:-3] if value[:9] == b'<![CDATA[' and value[-3:] == b']]>' else value
    except (ValueError, AttributeError, RecursionError):
        raise FormatException(ierror.WXBizMsgCrypt_ParseXml_Error) from None


def _echostr(value):
    """查询参数里的 echostr → 密文 (bytes)；有的代理把 ``+`` 变成了空格。"""
    return str(value or '').replace(' ', '+').encode('ascii', 'replace')


def _echo_text(text):
    """校验要答出去的明文，检查过了。签名不说是投递还是校验：录下的消息当作 echostr 发来，不能替他解密。"""
    if not _ECHO.fullmatch(text):
        raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer,
                          'no echostr inside：里面不是 echostr，多半是录下来重放的消息，不用管')
    return text


def _parse_query(query):
    """查询参数 → 四个参数里有的那些。每个最多一次，百分号解码一次，严格 UTF-8；别的不看。"""
    found = {}
    try:
        if query.count('&') >= 16:
            raise ValueError('查询参数多于 16 个')
        for part in query.split('&'):
            name, _, value = part.partition('=')
            if name in found:
                raise ValueError('查询参数里有两个 %s' % name)
            if name in ('msg_signature', 'timestamp', 'nonce', 'echostr'):      # 字母和数字没有要解码的，多半就是
                found[name] = value if value.isalnum() else urllib.parse.unquote_plus(value, errors='strict')
    except ValueError as e:
        raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, str(e)) from None
    return found


_RELEASED = 1795392000      # 2026-11-23：比这还早的时钟是没有校过的


class _Freshness:
    """与本机的时钟差得太多的，多半是重放的。"""
    warned = False

    def check(self, what, moment, now, back, ahead):
        """早 ``back`` 秒以上、晚 ``ahead`` 秒以上抛 `CryptoError`；``ahead`` 是 0 不看。时钟没有校过也不看，说一次。"""
        if now < _RELEASED:
            if not self.warned:
                self.warned = True
                logger.warning('the clock says %s：比这个版本还早，时钟没有校过，请校时 (NTP)',
                               time.strftime('%Y-%m-%d', time.gmtime(now)))
        elif ahead and not -back <= moment - now <= ahead:
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, '%s %d, clock here %d, more than %d s '
                              'apart：时间差得太多，请校时 (NTP)；时钟准的话是重放的旧消息' % (
                                  what, moment, now, back if moment < now else ahead))


def _code_and_value(method: 'Callable[P, str]') -> 'Callable[P, Tuple[int, Optional[str]]]':
    """官方方法的约定：返回 ``(返回码, 值)``，不抛异常。"""
    @functools.wraps(method)
    def answer(*args, **kwargs):
        try:
            return ierror.WXBizMsgCrypt_OK, method(*args, **kwargs)
        except WeChatError as e:
            return e.errcode, None
        except (TypeError, AttributeError):     # None、int：不是它要的 str
            return ierror.WXBizMsgCrypt_ComputeSignature_Error, None
    return answer


class WXBizMsgCrypt:
    """一个应用的验签和加解密，与官方示例同名同参。

    ``sToken`` 和 ``sEncodingAESKey``（恰好 43 个字符）在「应用管理 → 应用 →
    接收消息 → 设置API接收」；
    ``sCorpId`` 是企业ID，第三方套件用 SuiteID，智能机器人用空字符串。密钥不对
    抛 `FormatException` (-40004)，没有 AES 抛 `ImportError`，其中写着怎么装。
    """
    _lock: 'threading.Lock'

    def __init__(self, sToken: str, sEncodingAESKey: str, sCorpId: str) -> None:
        if not re.fullmatch('[A-Za-z0-9+/]{43}', sEncodingAESKey):
            others = len(re.findall('[^A-Za-z0-9+/]', sEncodingAESKey))
            raise FormatException(
                ierror.WXBizMsgCrypt_IllegalAesKey,
                'EncodingAESKey 应该恰好是 43 个字母和数字，现在是 %d 个%s，到后台重新复制' % (
                    len(sEncodingAESKey) - others, '，还有 %d 个别的字符' % others * bool(others)))
        key, aes = binascii.a2b_base64(sEncodingAESKey + '='), _aes()
        self._token, self._receive_id = sToken.encode('utf-8'), sCorpId.encode('utf-8')
        # CBC 的 IV 只影响第一块，而第一块正是没有人看的 random(16)：所以每个方向一个对象，一条接一条用下去。
        # 新建一个要 6 µs，一来一回两个，是整个编解码的四分之一。
        self._encryptor = aes.new(key, aes.MODE_CBC, key[:16])
        self._decryptor = aes.new(key, aes.MODE_CBC, key[:16])
        _fresh(self, _lock=threading.Lock)  # 用这两个对象时拿着

    def _signature(self, timestamp, nonce, encrypt):
        return hashlib.sha1(b''.join(sorted([self._token, timestamp.encode(), nonce.encode(), encrypt]))).hexdigest()

    def sign(self, timestamp: str, nonce: str, encrypt: bytes) -> str:
        """密文 (bytes) 的签名，40 个小写十六进制字符 (str)。"""
        if not _TIMESTAMP.fullmatch(timestamp) or not _NONCE.fullmatch(nonce):
            raise CryptoError(ierror.WXBizMsgCrypt_ComputeSignature_Error)
        return self._signature(timestamp, nonce, encrypt)

    def verify(self, msg_signature: str, timestamp: str, nonce: str, encrypt: bytes) -> None:
        """签名或某一段的格式不对就抛 `CryptoError`；密文 (bytes) 在这以前不必可
        信。
        """
        for name, value, form in (('msg_signature', msg_signature, _SIGNATURE),
                                  ('timestamp', timestamp, _TIMESTAMP), ('nonce', nonce, _NONCE)):
            if not value or not form.fullmatch(str(value)):
                raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error, '%s is %s' % (
                    name, 'malformed：格式不对：' + _show(value) if value else
                    'missing in the query：查询参数里没有它，不是企业微信来的，或代理丢了'))
        data = encrypt.rstrip(b'=')
        padding = len(encrypt) - len(data)
        if not data or data.translate(None, _BASE64) or padding > 2 or len(encrypt) % 4:
            raise CryptoError(ierror.WXBizMsgCrypt_DecodeBase64_Error)
        expected = self._signature(str(timestamp), nonce, encrypt)
        if not hmac.compare_digest(expected.encode(), msg_signature.encode()):
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateSignature_Error)

    def open(self, encrypt: bytes) -> str:
        """密文 (base64, bytes) → 明文 (str)。先 `verify`，再 `open`。"""
        return self._opened(encrypt, {self._receive_id: ''})[0]

    def _opened(self, encrypt, receive_ids):
        """→（明文，receiveid），都是 str；``receive_ids`` 是收的，{bytes: str}。"""
        try:
            data = binascii.a2b_base64(encrypt)
        except ValueError:
            raise CryptoError(ierror.WXBizMsgCrypt_DecodeBase64_Error) from None
        if len(data) < 32 or len(data) % 16:
            raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error,
                              'no multiple of 16：密文有 %d 个字节，多半是反向代理截断了' % len(data))
        with self._lock:
            data = self._decryptor.decrypt(data)[16:]
        padding = data[-1]
        if not 1 <= padding <= 32 or data[-padding:] != bytes([padding]) * padding:
            raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error)
        data = data[:-padding]
        end = 4 + int.from_bytes(data[:4], 'big')
        if end > len(data):
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer)
        receive_id = receive_ids.get(data[end:])
        if receive_id is None:
            theirs, ours = (_mask(i.decode('utf-8', 'replace')) for i in (data[end:], self._receive_id))
            raise CryptoError(ierror.WXBizMsgCrypt_ValidateCorpid_Error,
                              'receive id differs: got %s, %s' % (_show(theirs), 'corpid here is ' + ours if
                                                                  self._receive_id else '这里只有智能机器人'))
        try:
            return data[4:end].decode('utf-8'), receive_id
        except UnicodeDecodeError:
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, 'not UTF-8：解密出来的不是文字') from None

    def seal(self, message: 'Union[str, bytes]') -> bytes:
        """明文 (str 或 UTF-8 的 bytes) → 密文 (base64, bytes)。"""
        try:
            data = message.encode('utf-8') if isinstance(message, str) else bytes(memoryview(message))
        except (UnicodeEncodeError, TypeError):
            raise CryptoError(ierror.WXBizMsgCrypt_EncryptAES_Error) from None
        data = os.urandom(16) + struct.pack('>I', len(data)) + data + self._receive_id
        padding = 32 - len(data) % 32
        with self._lock:
            data = self._encryptor.encrypt(data + bytes([padding]) * padding)
        return binascii.b2a_base64(data, newline=False)

    def verify_url(self, msg_signature: str, timestamp: str, nonce: str, echostr: str) -> str:
        """「保存」时的 GET 校验 (path/90930)：返回要原样答出去的明文 (str)，1 到
        64 个可见的 ASCII 字符。
        """
        encrypt = _echostr(echostr)
        self.verify(msg_signature, timestamp, nonce, encrypt)
        return _echo_text(self.open(encrypt))

    def decrypt_message(self, body: 'Union[str, bytes]', msg_signature: str, timestamp: str, nonce: str) -> str:
        """收到的信封 (str 或 bytes，XML 或 JSON) → 明文 (str)。"""
        encrypt = _cut_encrypt(body.encode('utf-8', 'replace') if isinstance(body, str) else body)
        self.verify(msg_signature, timestamp, nonce, encrypt)
        return self.open(encrypt)

    def encrypt_message(self, message: 'Union[str, bytes]', nonce: str,
                        timestamp: 'Union[None, str, int]' = None) -> str:
        """要回的明文 (str 或 bytes) → 信封 (str)。``timestamp`` 是 Unix 秒，默认
        现在。
        """
        timestamp = str(timestamp or int(time.time()))
        encrypt = self.seal(message)
        # 密文是 base64，签名是十六进制，timestamp 由 sign 验过是十位数字：不用转义
        return ('<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature><TimeStamp>%s'
                '</TimeStamp>%s</xml>' % (encrypt.decode(), self.sign(timestamp, nonce, encrypt), timestamp,
                                          _write_element('Nonce', nonce, 1)))

    def encrypt_json(self, message: 'Union[str, bytes]', nonce: str,
                     timestamp: 'Union[None, str, int]' = None) -> str:
        """`encrypt_message`，信封是 JSON (str)：智能机器人的 (path/101039)。"""
        timestamp = str(timestamp or int(time.time()))
        encrypt = self.seal(message)
        return json.dumps({'encrypt': encrypt.decode(), 'msgsignature': self.sign(timestamp, nonce, encrypt),
                           'timestamp': int(timestamp), 'nonce': nonce})

    @_code_and_value
    def VerifyURL(self, sMsgSignature: str, sTimeStamp: str, sNonce: str, sEchoStr: str) -> str:
        """`verify_url` 的官方形式：``(0, 明文)`` 或 ``(返回码, None)``。"""
        return self.verify_url(sMsgSignature, sTimeStamp, sNonce, sEchoStr)

    @_code_and_value
    def DecryptMsg(self, sPostData: 'Union[str, bytes]', sMsgSignature: str, sTimeStamp: str, sNonce: str) -> str:
        """`decrypt_message` 的官方形式：``(0, 明文)`` 或 ``(返回码, None)``。"""
        return self.decrypt_message(sPostData, sMsgSignature, sTimeStamp, sNonce)

    @_code_and_value
    def EncryptMsg(self, sReplyMsg: 'Union[str, bytes]', sNonce: str,
                   timestamp: 'Union[None, str, int]' = None) -> str:
        """`encrypt_message` 的官方形式：``(0, 信封)`` 或 ``(返回码, None)``。"""
        return self.encrypt_message(sReplyMsg, sNonce, timestamp)


# ---- 配置 Configuration -----------------------------------------------------------------------
# config.ini：每个应用一节，[system] 放其余的；文件里没写的由环境变量 EASYWECHAT_<大写的键> 补上，关键字参数优先于两者。
# 一行是 [节]、键 = 值（也可以是 ：）、# 注释，或空的；缩进、首尾的空白和引号去掉，键不分大小写和下划线。

_APP_KEYS = tuple('corpid secret appid agentid token encoding_aes_key touser robot api_base ca_file '
                  'bot_id bot_secret bot_url bot_name bot_placeholder'.split())
_SECRETS = 'secret', 'token', 'encoding_aes_key', 'robot', 'bot_secret'
_THINKING = '<think></think>'   #: bot_placeholder 的默认值：企业微信显示「思考中」。
_SYSTEM_KEYS = 'route_name', 'log_path', 'log_name'
_BLANKS = ' \t\r\n\u00a0\u200b\u3000\ufeff'

#: --init 写出的文件；config.ini.example 就是它，空着两个密钥。
_CONFIG_TEMPLATE = """\
# EasyWeChat 的配置。一节是一个应用，节名就是 WeChatServer('demo') 里的名字。
# 管理后台：https://work.weixin.qq.com/wework_admin/
# 这个文件里有密钥：chmod 600 config.ini

[demo]
# 企业ID：「我的企业 → 企业信息」最下面，ww 开头，18 个字符
corpid = {corpid}
# AgentId 和 Secret，主动发送才要：「应用管理 → 自建 → 你的应用」最上面
agentid =
secret =
# 不写收件人时发给谁：「通讯录 → 成员」里的「账号」，几个用 | 隔开，@all 是可见范围里的所有人
touser =
# 智能机器人，不要公网地址、可信 IP：「智能机器人 → 创建 → API 模式 → 长连接」里的 BotID 和 Secret，只要这两样就能收发。
# 跟它说一句话，它会打印 touser 该写什么；bot_name 是它的名字，群里的 @名字 会去掉
bot_id =
bot_secret =
bot_name =
# 群机器人 Webhook 地址里 key= 后面的，--robot 才要：「群 → 消息推送 → 添加」
robot =
# 家里没有固定 IP 时的中转，例如 https://vps.example.com；不写就直连
api_base =
# Token 和 EncodingAESKey：「应用管理 → 自建 → 你的应用 → 接收消息 → 设置API接收」。
# 两边要一样：把这里的抄到后台，或把后台随机生成的抄到这里（EncodingAESKey 恰好 43 个字符）
token = {token}
encoding_aes_key = {encoding_aes_key}

[system]
# 回调 URL 的路径：http://你的地址:端口/weixin
route_name = weixin
# 日志文件的目录和文件名；不写目录就只输出到 stderr
log_path =
log_name = easywechat.log
"""


class _Settings(dict):
    """一个应用的设置；``repr`` 只有键名，不会把密钥带进日志。``sources``：键 → 从哪里来；``unknown``：不认得的键。"""
    sources: 'Dict[str, str]'
    unknown: 'List[str]'
    appname: str = 'demo'

    def __repr__(self):
        return '<settings: %s>' % ', '.join(sorted(key for key in self if self[key]))


def _require(settings, *keys):
    """这几个键不能空着；空着的抛 `ConfigError`。"""
    for key in keys:
        if not settings[key]:
            raise ConfigError('没有写 %s：写进 config.ini 的 [%s]，或环境变量 EASYWECHAT_%s' % (
                key, settings.appname, key.upper()))


def _command(*args):
    """这个文件的一条命令，在这里能照着打的 (str)。"""
    import shutil
    python, path = sys.executable or 'python3', _FILE
    if shutil.which(os.path.basename(python)) == python:
        python = os.path.basename(python)
    here = os.path.join(os.getcwd(), '')
    words = (python, path[len(here):] if path.startswith(here) else path) + args
    return ' '.join(word if re.fullmatch(r'[\w@%+=:,./\\-]+', word) else '"%s"' % word for word in words)


def _only_ours(path):
    """文件和它的目录都是自己的或 root 的，别人改不了。"""
    if os.name != 'posix':
        return True
    real = os.path.realpath(path)
    found = [os.stat(p) for p in (os.path.dirname(path), os.path.dirname(real), real)]
    return all(f.st_uid in (0, os.geteuid()) and not f.st_mode & 0o022 for f in found)


def _find_config(ini_name):
    """→（要读的 config.ini 的路径，没有是 None；它只是因为在当前目录里才找到的；试过的路径）。"""
    if ini_name or os.environ.get('EASYWECHAT_CONFIG'):
        paths, ours = [os.path.abspath(ini_name or os.environ['EASYWECHAT_CONFIG'])], None
    else:
        script = getattr(sys.modules.get('__main__'), '__file__', None) or _FILE
        ours = [os.path.dirname(path(f)) for path, f in (
            (os.path.abspath, script), (os.path.realpath, script), (os.path.abspath, _FILE))]
        paths = [os.path.join(f, 'config.ini') for f in dict.fromkeys(ours[:2] + [os.getcwd(), ours[2]])]
    for path in paths:
        here = ours is not None and os.path.dirname(path) not in ours
        if os.path.isdir(path):
            raise ConfigError('%s 是一个目录，不是文件：Docker 要挂载的文件不存在时会这样；删掉它，写好文件再挂载'
                              % path)
        if os.path.isfile(path):
            if not here or _only_ours(path):
                return path, here, paths
            logger.warning('%s is not read：当前目录里的这个文件别人也能改，所以不读；请执行 chmod go-w %s %s，'
                           '或用环境变量 EASYWECHAT_CONFIG 指定它', path, path, os.path.dirname(path))
    return None, False, paths


def _keeps_modes(folder):
    """这里的文件能不能只给自己：FAT、exFAT、有的挂载不能，什么都是 0777。"""
    import tempfile
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as f:
        return not os.fstat(f.fileno()).st_mode & 0o077
    return True


def _text_of(data):
    """bytes → str：UTF-8（可有 BOM）、有 BOM 的 UTF-16，否则 GB18030；都不是抛 `UnicodeError`。"""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return data.decode('utf-16')
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        with contextlib.suppress(LookupError):      # 小系统没有 gb18030
            return data.decode('gb18030')
        raise


def _clean(value):
    value = value.strip(_BLANKS)
    for left, right in '""', "''", '\u201c\u201d', '\u2018\u2019':
        if len(value) > 1 and value[0] == left and value[-1] == right:
            return value[1:-1].strip(_BLANKS)
    return value


_INI_SECTION = re.compile(r'\[([^][]+)\]\s*(?:[#;].*)?')
_INI_VALUE = re.compile('([^][\\s=:\uff1d\uff1a]+)\\s*[=:]\\s*(.*)')
#: 两样都不是的一行，不对在哪里。
_INI_WRONG = [(re.compile(form), advice) for form, advice in (
    ('//', '注释要以 # 开头'), ('\uff03', '# 要用半角的'),
    ('[\u3010\u3014\uff3b]', '节名要用半角的方括号，例如 [demo]'),
    (r'\[', '节名要单独一行，写在一对方括号里，例如 [demo]'), ('[^=:]*[\uff1d\uff1a]', '等号要用半角的 ='),
    ('[=:]', '等号左边没有键，应该是 键 = 值'), ('', '没有等号，应该是 键 = 值'))]


def _parse_ini(text, path):
    """ini 文件的文字 → {节：{键：值}}，键是小写的；读不懂的抛 `ConfigError`，说第几行，不说内容：它可能是密钥。"""
    sections, lines, section, key = {}, {}, None, None
    for n, raw in enumerate(re.split('\r\n|\r|\n', text), 1):
        line, wrong = raw.strip(_BLANKS), ''
        head, pair = _INI_SECTION.fullmatch(line), _INI_VALUE.fullmatch(line)
        if not line or line[0] in '#;':
            continue
        if head:
            section = head.group(1).strip(_BLANKS)
            if section in sections:
                wrong = '第 %d 行已经有这一节了，合成一节' % lines[section]
            sections[section], lines[section], key = {}, n, None
        elif key and not pair and raw[:1] in ' \t':         # 缩进的，没有等号：上一个值的又一行，例如一段提示词
            sections[section][key] += '\n' + line
        elif line.startswith('//') or not pair:
            wrong = next(advice for form, advice in _INI_WRONG if form.match(line))
        elif section is None:
            wrong = '前面还没有节名，例如 [demo]'
        else:
            key = pair.group(1).lower()
            if key in sections[section]:
                wrong = '第 %d 行已经写过这个键了，留一个' % lines[section, key]
            sections[section][key], lines[section, key] = _clean(re.split(r'\s[#;]', ' ' + pair.group(2))[0]), n
        if wrong:
            raise ConfigError('%s 第 %d 行：%s' % (path, n, wrong))
    return sections


def _read_ini(path):
    """→ {节：{键：值}}。里面有密钥：别人能改就不读，能读就提醒。"""
    try:
        mode = os.stat(path).st_mode if os.name == 'posix' else 0
        if mode & 0o006 and not _keeps_modes(os.path.dirname(path)):
            logger.warning('%s 所在的文件系统不记权限，谁都能读：密钥请写进环境变量 EASYWECHAT_SECRET、'
                           'EASYWECHAT_TOKEN、EASYWECHAT_ENCODING_AES_KEY，或把文件放到别处', path)
        elif mode & 0o002:
            raise ConfigError('谁都能改 %s，所以不读：请执行 chmod 600 %s，看看里面有没有被改过' % (path, path))
        elif mode & 0o004:
            logger.warning('谁都能读 %s，里面有密钥：请执行 chmod 600 %s', path, path)
        with open(path, 'rb') as f:
            data = f.read((1 << 20) + 1)
    except OSError as e:
        raise ConfigError('读不了 %s：%s' % (path, e.strerror)) from None
    if len(data) > 1 << 20:
        raise ConfigError('%s 有一兆多，不是配置：看看路径写对没有' % path)
    try:
        return _parse_ini(_text_of(data), path)
    except UnicodeError:
        raise ConfigError('%s 不是文本：另存为 UTF-8' % path) from None


def _joined(who):
    """收件人 (str，或它们的 list) → ``'a|b'``；逗号、分号、顿号，全角的也行：UserID 里没有这些。"""
    text = '|'.join(map(str, who)) if hasattr(who, '__iter__') and not isinstance(who, str) else str(who or '')
    return '|'.join(filter(None, re.split('[|,;\\s\uff5c\uff0c\uff1b\u3001]+', text)))


def _plain(key):
    """键的各种写法：EncodingAESKey、CorpSecret、corp-id。"""
    key = re.sub('[_-]', '', key).lower()
    return 'secret' if key == 'corpsecret' else key


def _known(found, keys, where, unknown):
    """一节里认得的 → {键：值}；不认得的说一次，记在 ``unknown`` 里。"""
    values, names = {}, {_plain(key): key for key in keys}
    for key, value in found.items():
        name = names.get(_plain(key))
        if name in values:
            raise ConfigError('%s：%s 写了两次，留一个' % (where, name))
        if name and '\n' in value:
            raise ConfigError('%s：%s 下面的一行没有等号，应该是 键 = 值' % (where, name))
        if name:
            values[name] = value
            continue
        import difflib
        close = difflib.get_close_matches(_plain(key), names, 1, 0.5)
        shown = key if re.fullmatch('[a-z_-]{1,24}', key) else '一个'       # 可能是写错了地方的密钥
        unknown.append('%s：没有 %s 这个键%s' % (where, shown, '，是不是 %s？' % names[close[0]] if close else ''))
        logger.warning('unknown key：%s', unknown[-1])
    return values


def _sources(appname, path, settings, unknown):
    """→ [（从哪里来，{键：值}）]，前面的优先：文件的两节、环境变量。"""
    keys = _APP_KEYS + _SYSTEM_KEYS
    variables = ((key, os.environ.get('EASYWECHAT_' + key.upper())) for key in keys)
    sources = [('environment', {key: _clean(_decoded(value)) for key, value in variables if value})]
    if path:
        ini = _read_ini(path)
        if appname not in ini and not settings:
            names = ['[%s]' % name for name in ini if re.fullmatch(r'(?!system$)[\w .-]{1,32}', name)]
            raise ConfigError('%s 里没有 [%s] 这一节，%s' % (
                path, appname, '有的是 %s：节名和程序里的名字要一样，大小写也是' % '、'.join(names) if ini else
                '是空的；删掉它，再执行 ' + _command('--init')))
        for section, keys in (appname, _APP_KEYS), ('system', _SYSTEM_KEYS):
            where = '%s [%s]' % (path, section)
            if section in ini:
                sources.insert(0, (where, _known(ini[section], keys, where, unknown)))
    return sources


def _complete(values):
    """从别的键推出来的：agentid 和 appid 一样；后台的「Secret」；bot_placeholder 不写和空着不一样。"""
    for key, other in ('agentid', 'appid'), ('appid', 'agentid'):
        if not values[key]:
            values[key], values.sources[key] = values[other], values.sources.get(other, '')
    if values['bot_id'] and not values['corpid'] and not values['bot_secret']:     # 后台的「Secret」，抄了过来
        values['bot_secret'], values['secret'] = values['secret'], ''
        values.sources['bot_secret'] = values.sources.get('secret', '')
    if 'bot_placeholder' not in values.sources:
        values['bot_placeholder'] = _THINKING


def get_config(appname: 'Union[str, Dict[str, str]]', ini_name: 'Optional[str]' = None, needs: 'Who' = (),
               **settings: 'Union[None, str, int]') -> 'Dict[str, str]':
    """应用 ``appname`` 的设置，一个 dict；没写的键是 ``''``，``agentid`` 与
    ``appid`` 相同。

    依次找 ``ini_name``，否则环境变量 ``EASYWECHAT_CONFIG``，否则脚本的目录、
    当前目录（只有自己或 root 能改的才算）、本文件的目录里的 config.ini。环境
    变量 ``EASYWECHAT_CORPID`` 等补上没写的；关键字参数盖过其余的，None 是没
    给。找不到、读不懂、没有这一节，抛 `ConfigError`，其中有试过的每个路径。
    ``appname`` 是上一次的结果，就照用。

    ``needs`` 是不能空着的键，例如 ``('secret', 'agentid', 'touser')``，空着的
    抛 `ConfigError`；发消息要的 corpid、secret、agentid，智能机器人（有
    bot_secret）的不用写。
    """
    if isinstance(appname, _Settings):
        return appname
    needed = [key for key in _joined(needs).split('|') if key]
    wrong = set(settings).union(needed) - set(_APP_KEYS + _SYSTEM_KEYS)
    if wrong:
        raise TypeError('没有这个设置：%s' % ', '.join(sorted(wrong)))
    path, here, paths = _find_config(ini_name)
    given = {k: _clean(str(v)) for k, v in settings.items() if v is not None}
    values = _Settings(dict.fromkeys(_APP_KEYS + _SYSTEM_KEYS, ''))
    values.sources, values.unknown, values.appname = {}, [], str(appname)
    for source, found in _sources(appname, path, settings, values.unknown) + [('keyword', given)]:
        for key, value in found.items():
            if source == 'keyword' or not values[key]:
                values[key], values.sources[key] = value, source
    if not path and (ini_name or not any(values[k] for k in _APP_KEYS)):
        raise ConfigError('没有找到配置，找过：%s。新建一个：%s；没有账号，先用 examples/simulator.py 在本机试'
                          % ('、'.join(paths), _command('--init')))
    for key in ('api_base', 'ca_file', 'bot_url') * here:   # 别人写的 config.ini 的 api_base，不能得到环境变量里的密钥
        if values[key] and values.sources[key].startswith(path) and any(
                values[k] and not values.sources[k].startswith(path) for k in ('secret', 'robot', 'bot_secret')):
            raise ConfigError('%s 里的 %s 得不到别处的密钥：设置 EASYWECHAT_%s，或用 EASYWECHAT_CONFIG 指定这个文件'
                              % (path, key, key.upper()))
    for key in ('corpid', 'agentid', 'bot_id') + _SECRETS:
        if re.search('[^!-~]', values[key]):
            logger.warning('%s looks wrong：%s 里有空白、全角或不可见字符，请重新复制', key, key)
    _complete(values)
    values['touser'] = _joined(values['touser'])
    _require(values, *(key for key in needed if not values['bot_secret'] or key not in ('corpid', 'secret', 'agentid')))
    _remember(*(values[k] for k in _SECRETS))
    return values


def get_section(name: str, ini_name: 'Optional[str]' = None) -> 'Dict[str, str]':
    """同一个 config.ini 里别的一节，例如自己的程序的阈值 → dict，键是小写的，值
    是 str；没有文件、这一节是 ``{}``。
    """
    path = _find_config(ini_name)[0]
    return _read_ini(path).get(name, {}) if path else {}


# ---- 线程 Threads -----------------------------------------------------------------------------
# 留着的线程 (_Seats)，一种活同时用几条 (_Threads)，交给别的线程、有时限的一次调用 (_Promise)，asyncio 的循环 (_Loop)。

class _Seats:
    """空闲的线程，各处共用：有空闲的就用最近用过的那条，没有才开新的。"""
    idle = 2  #: 空闲这么多秒的线程结束。

    def __init__(self):
        # _free：座位 [叫醒它的锁，它的活]，后进先出；_starting：threading.stack_size 是整个进程的
        _fresh(self, _lock=threading.Lock, _free=list, _starting=threading.Lock)

    def start(self, target, *args):
        """开一条栈有 1 MiB 的线程：musl 的默认值 128 KiB 太小，几层嵌套就能让进程崩溃。开不了抛 `RuntimeError`。"""
        with self._starting:
            before = threading.stack_size(1 << 20)
            try:
                thread = threading.Thread(target=target, args=args, daemon=True)
                thread.start()
                return thread
            finally:
                threading.stack_size(before)

    def run(self, after, job, args):
        """在另一条线程上 ``job(*args)``，然后 ``after()``；开不出线程抛 `RuntimeError`。"""
        with self._lock:
            seat = self._free.pop() if self._free else None
        if seat:
            seat[1] = after, job, args
            seat[0].release()
        else:
            self.start(self._sit, (after, job, args))

    def _sit(self, work):
        seat = [threading.Lock(), None]
        seat[0].acquire()
        while work:
            after, job, args = work
            try:
                job(*args)
            except BaseException:       # 本文件的错；线程还要接着用
                logger.error('internal error：一条线程里，这个文件自己的错%s', _traceback())
            work = job = args = seat[1] = None
            with self._lock:
                self._free.append(seat)
            after()
            if not seat[0].acquire(timeout=self.idle):
                with self._lock:
                    if seat in self._free:
                        self._free.remove(seat)
                        return
                seat[0].acquire()       # 活正在路上
            work = seat[1]


_SEATS = _Seats()


class _Threads:
    """一种活，最多 ``limit`` 件同时做。"""
    def __init__(self, limit):
        self._limit = limit
        _fresh(self, _busy=int, _changed=threading.Condition)

    def submit(self, wait, job, *args):
        """交出一件活，最多等 ``wait`` 秒轮到它；轮不到、开不出线程，返回 False。"""
        _check_fork()
        with self._changed:
            if self._busy >= self._limit and not self._changed.wait_for(lambda: self._busy < self._limit, wait):
                return False
            self._busy += 1
        try:
            _SEATS.run(self._done, job, args)
            return True
        except RuntimeError:            # can't start new thread
            self._done()
            return False

    def _done(self):
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def wait(self, deadline):
        """等手里的做完，至多到 ``deadline``（monotonic 秒）；都做完了返回 True。"""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, max(0, deadline - time.monotonic()))


class _Promise:
    """别的线程上的一次 ``job()``；几个人可以等同一个，各有各的时限：DNS 没有时限，套接字的每个字节都重新计时。"""
    def __init__(self, threads, job, wait):
        self._value = self._error = None
        self._gate = threading.Lock()       # 开着就是有了结果
        self._gate.acquire()
        if not threads.submit(wait, self._run, job):
            self._error = RuntimeError('同时的调用太多')
            self._gate.release()

    def _run(self, job):
        try:
            self._value = job()
        except BaseException as e:          # 到等着的线程里再抛
            self._error = e
        self._gate.release()

    def done(self):
        return not self._gate.locked()

    def result(self, within):
        """等到 ``within`` 秒为止 → ``job()`` 的结果，或抛它抛的；等不到抛 `socket.timeout`。"""
        end = time.monotonic() + max(0, within)
        while not self._gate.acquire(timeout=max(0, end - time.monotonic())):
            late = time.monotonic() - end
            if late < 0.1 or within <= 0:
                raise socket.timeout('no answer within %.3g s' % within)
            end = time.monotonic() + min(within, 1)         # 进程停过（SIGSTOP、休眠）：那条线程也没有跑，再等一会儿
        self._gate.release()                # 还有别人在等
        if self._error:
            raise copy.copy(self._error) if isinstance(self._error, APIError) else self._error
        return self._value


def _within(threads, seconds, job):
    """在 ``threads`` 的一条线程上 ``job()`` → 它的结果，或抛它抛的；``seconds`` 秒没有结果抛 `socket.timeout`。

    等到最后才轮到的，再给它半秒：刚开始就说它没有答，等于没有问。
    """
    deadline = time.monotonic() + seconds
    promise = _Promise(threads, job, seconds)
    return promise.result(max(deadline - time.monotonic(), min(seconds, 0.5)))


class _Loop:
    """``async def`` 的：整个进程一个 asyncio 循环，在自己的线程里；所以几个回调可以共用一个 session。"""
    def __init__(self):
        self._loops = {}        # 进程 → 循环。fork 出来的进程另开一个；父进程的也留着：关掉它，父进程的就坏了
        _fresh(self, _lock=threading.Lock)

    def start(self):
        """→ 循环，没有就开；没有 asyncio 抛 `ImportError`，开不出线程抛 `RuntimeError`。"""
        _check_fork()
        with self._lock:
            if os.getpid() not in self._loops:
                try:
                    import asyncio
                except ImportError:
                    raise ImportError('async def 的回调要 asyncio，没有装：opkg install python3-asyncio') from None
                loop = asyncio.new_event_loop()
                _SEATS.start(self._run, asyncio, loop)
                self._loops[os.getpid()] = loop
            return self._loops[os.getpid()]

    @staticmethod
    def _run(asyncio, loop):
        asyncio.set_event_loop(loop)
        loop.run_forever()

    @contextlib.contextmanager
    def _task(self, coroutine, under_way):
        """在循环里跑 ``coroutine``；在 ``under_way`` 里的时候可以取消，走出去也取消。"""
        import asyncio
        future = asyncio.run_coroutine_threadsafe(coroutine, self.start())
        under_way.add(future)
        try:
            yield future
        finally:
            future.cancel()
            under_way.discard(future)

    def wait(self, awaitable, under_way):
        """等 ``awaitable`` → 它的结果，或抛它抛的；取消了抛 CancelledError。"""
        async def run():
            return await awaitable
        with self._task(run(), under_way) as future:
            return future.result()

    def each(self, items, under_way):
        """异步的生成器 → 普通的。从头到尾是一个 task（asyncio.timeout 要这样）；要了一个，它才往下走。"""
        import queue
        given, loop = queue.Queue(), self.start()

        async def run():
            try:
                async for item in items:
                    taken = loop.create_future()
                    given.put((item, taken))
                    await taken
            finally:
                if hasattr(items, 'aclose'):
                    await items.aclose()
        with self._task(run(), under_way) as future:
            future.add_done_callback(lambda _: given.put(None))
            for item, taken in iter(given.get, None):
                yield item
                loop.call_soon_threadsafe(lambda taken=taken: taken.done() or taken.set_result(None))
            future.result()


_LOOP = _Loop()


# ---- 存储 Store -------------------------------------------------------------------------------
# 认领过的消息和 access_token 放在这里，接口是 redis-py 的三个方法：get、set(ex=, nx=)、delete。
# 认领 (claim)：「这条消息我在处理」。持有它的进程死了，别人才能接手：`FileStore` 靠进程一直锁着的一个
# 文件，进程停住、算得再久也不松开，死了立刻松开；别的存储靠租期 (lease)，活着的进程一直续 (hold)。

class _Pages(collections.deque):
    """十六页 {名字：…}，旧的在前，满了丢掉最旧的一页。一个大 dict 隔一阵就要搬一次家，malloc 的碎片会有十几 MB。"""
    def __init__(self):
        super().__init__([{}], 16)
        self._size = 0                  # 最新一页的字节

    def page_of(self, name):
        """``name`` 在哪一页；没有是 {}。"""
        for page in reversed(self):
            if name in page:
                return page
        return {}

    def put(self, name, value, size, limits):
        self[-1][name] = value
        self._size += size
        if 16 * len(self[-1]) >= limits.max_entries or 16 * self._size >= limits.max_bytes:
            self.append({})
            self._size = 0


class MemoryStore:
    """进程内的存储，按条数和字节数封顶，最旧的先出去。任何线程都可以用。

    大的值（超过 64 字节：答复）另外封顶，出去得早：那时名字还在，值成了
    ``b''``；所以跑过的消息总是记得。上限：

        max_entries = 10000         # 条
        max_bytes = 4 << 20         # 字节：名字和小的值、大的值，各这么多
    """
    max_entries: int = 10000
    max_bytes: int = 4 << 20

    _lock: 'threading.Lock'
    _clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        # 名字 →（到期的时刻，值，None 是在 _large 里）；名字 → 大的值
        self._pages, self._large = _Pages(), _Pages()
        _fresh(self, _lock=threading.Lock)

    def _take(self, name):
        """取出 ``name`` →（到期的时刻，值）；没有或到期了是 None。"""
        found = self._pages.page_of(name).pop(name, None)
        if found and found[1] is None:
            found = found[0], self._large.page_of(name).pop(name, b'')
        return found if found and found[0] > self._clock() else None

    def get(self, name: str) -> 'Optional[bytes]':
        """``name`` (str) 的值 (bytes)；没有或到期了是 None。"""
        with self._lock:
            ends, value = self._pages.page_of(name).get(name, (0, None))
            if ends <= self._clock():
                return None
            return self._large.page_of(name).get(name, b'') if value is None else value

    def set(self, name: str, value: bytes, ex: 'Optional[float]' = None, nx: bool = False) -> 'Optional[bool]':
        """记下 ``value`` (bytes)，``ex`` 秒后到期；``nx`` 为真时只在没有的时候
        记。记了返回 True，否则 None。
        """
        with self._lock:
            if nx and self._pages.page_of(name).get(name, (0, None))[0] > self._clock():
                return None
            self._take(name)
            ends, large = self._clock() + ex if ex else float('inf'), len(value) > 64
            self._pages.put(name, (ends, None if large else value), len(name) + (0 if large else len(value)), self)
            if large:
                self._large.put(name, value, len(value), self)
            return True

    def delete(self, name: str) -> int:
        """删掉 ``name``；返回删了几条 (int)。"""
        with self._lock:
            return int(self._take(name) is not None)

    def claim(self, name: str, lease: float) -> 'Optional[bool]':
        """认领 ``name``：值是 ``-`` 的一条记录，``lease`` 秒到期；已经有记录返回
        None。
        """
        return self.set(name, b'-', ex=int(-(-lease // 1)), nx=True)

    def hold(self, name: str, lease: float) -> None:
        """认领还算数：续租。"""
        self.set(name, b'-', ex=int(-(-lease // 1)))


def _base(variable, default):
    home = os.path.expanduser('~')
    return os.environ.get(variable) or (os.path.join(home, default) if home != '~' else os.devnull)


def _cache_folders():
    import tempfile
    user = str(os.getuid()) if os.name == 'posix' else os.environ.get('USERNAME', '')
    return [os.path.join(_base('XDG_CACHE_HOME', '.cache'), 'easywechat'),
            os.path.join(tempfile.gettempdir(), 'easywechat-' + user)]


def _private(folders):
    """``folders`` 里第一个只有自己能写的 → 它的路径 (str)，没有就建 (0700)；都不行抛 `OSError`。"""
    for folder in folders:
        try:
            os.makedirs(folder, 0o700, exist_ok=True)
            found = os.lstat(folder)
            if os.name == 'posix' and (not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022
                                       or found.st_uid != os.geteuid()):
                raise OSError(errno.EPERM, '别人也能写这个目录，所以不用它', folder)
            if not os.access(folder, os.W_OK):
                raise OSError(errno.EACCES, '这个目录写不了', folder)
            return os.path.realpath(folder)
        except OSError as e:
            failure = e
    raise failure


def state_folder() -> str:
    """记事情的目录 (str)：``$XDG_STATE_HOME/easywechat`` 或
    ``~/.local/state/easywechat``，没有就建 (0700)。

    ``FileStore(state_folder())`` 是重启以后还在的存储。是别人的、别人能写的、
    符号链接、写不了，抛 `OSError`。
    """
    return _private([os.path.join(_base('XDG_STATE_HOME', '.local/state'), 'easywechat')])


def _on_remote(folder):
    """``folder`` 是不是在网络盘上，那里的锁不一定管得到别的机器；看不出来当作不是。"""
    longest = kind = ''
    with contextlib.suppress(OSError, ValueError), open('/proc/self/mounts', encoding='utf-8', errors='replace') as f:
        for line in f:
            where, this = line.split()[1:3]
            where = where.replace('\\040', ' ').rstrip('/') + '/'
            if (folder + '/').startswith(where) and len(where) >= len(longest):
                longest, kind = where, this
    return bool(re.match('nfs|cifs|smb|9p|fuse|afs|ceph|gluster|lustre|coda|davfs', kind))


def _lock_file(path, flags=0):
    """打开并且锁住文件 → 描述符；别的进程锁着是 None；锁不了（没有 fcntl、网络盘）抛 `OSError`、`ImportError`。"""
    import fcntl
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    try:                # 没有 flags 是看一眼：共享锁，几个进程同时看，谁也不把别人的这一眼当作主人
        fcntl.lockf(fd, (fcntl.LOCK_EX if flags else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return fd
    except OSError as e:
        os.close(fd)
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return None


class FileStore:
    """磁盘上的存储，这台机器的各个进程共用：目录 0700，文件 0600，一条一个文件，
    写是原子的。

    ``folder`` 默认是 ``$XDG_CACHE_HOME/easywechat``、``~/.cache/easywechat``
    或 ``<tmp>/easywechat-<uid>``。文件名是名字的散列。不是自己的、别人能读的
    文件当作没有；写不了磁盘抛 `OSError`；目录没了就重新建。
    """

    # 一个文件：一行「写的时刻 到期的时刻 写的时刻（开机以来）长度」（毫秒），然后是值。时钟会跳：墙上的、开机以来的，
    # 有一只说没到期，就没有到期（重启以后只看第一只）。认领的第一格是主人文件的名字：主人锁着它，就算数，与时钟无关。
    # 锁用 lockf：fork 出来的子进程不会把它带走，进程一死就松开。它不分线程，关掉这个文件的任何一个描述符都会松开它：
    # 本进程的线程先拿 `_locks` 里的锁，自己的主人文件从不再打开。

    _locks: 'Dict[str, threading.Lock]'
    _owners: 'Dict[str, Tuple[Optional[int], Optional[str]]]'

    _now, _clock = staticmethod(time.time), staticmethod(time.monotonic)

    def __init__(self, folder: 'Optional[str]' = None) -> None:
        self._folders = [folder] if folder else None
        self._folder = None             # 第一次用到才建
        self._swept = 0

    def _choose(self):
        return _private(self._folders or _cache_folders())

    def _path(self, name, form='%s'):
        _check_fork()
        self._folder = folder = self._folder or self._choose()
        return os.path.join(folder, form % hashlib.sha1(name.encode('utf-8')).hexdigest())

    def _again(self, job, *args):
        """``job(*args)``；目录没了就重新建，再来一次。"""
        try:
            return job(*args)
        except FileNotFoundError:
            self._folder = self._choose()
            return job(*args)

    def _owner(self):
        """这个进程在这个目录里的主人文件的名字；锁不了（没有 fcntl、网络盘）是 None。"""
        folder = self._folder
        with self._locks.setdefault(folder, threading.Lock()):
            fd, name = self._owners.get(folder, (-1, ''))
            with contextlib.suppress(OSError):      # 被人删了。不关它：描述符要是也被人关了，号已经是别的文件的
                if name is None or os.path.samestat(os.stat(os.path.join(folder, name)), os.fstat(fd)):
                    return name
            fd, name = None, 'owner-%d-%s' % (os.getpid(), binascii.hexlify(os.urandom(8)).decode())
            try:
                if not _on_remote(folder):
                    fd = _lock_file(os.path.join(folder, name), os.O_CREAT | os.O_EXCL)
            except FileNotFoundError:
                raise
            except (ImportError, OSError) as e:     # ENOLCK
                logger.info('no locks in %s：这里锁不了文件，靠租期：%s', folder, e)
            name = name if fd is not None else None
            self._owners[folder] = fd, name
            return name

    def _alive(self, owner):
        if any(name == owner for _, name in list(self._owners.values())):
            return True
        with contextlib.suppress(ImportError, OSError):
            fd = _lock_file(os.path.join(self._folder, owner))
            if fd is None:
                return True
            os.close(fd)
        return False

    def _read(self, path):
        """文件里的值 (bytes)；没有、过期、不可信是 None。"""
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0))
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ELOOP):      # ELOOP：别人放的符号链接
                return None
            raise
        with open(fd, 'rb') as f:
            found = os.fstat(fd)
            if os.name == 'posix' and (found.st_uid != os.geteuid() or found.st_mode & 0o077
                                       or not stat.S_ISREG(found.st_mode)):
                logger.warning('%s ignored：别人也能读写它，所以不用', path)
                return None
            head, _, value = f.read().partition(b'\n')     # 是自己的文件：多大的都是自己写的，读不全就丢了
        match = re.fullmatch(rb'(?:(\d{1,15})|(owner-\d+-[0-9a-f]+)) (\d{1,15}) (\d{1,15}) (\d{1,9})', head)
        if not match or len(value) != int(match.group(5)):
            return None
        if match.group(2):
            return value if self._alive(match.group(2).decode()) else None
        written, ends, since = int(match.group(1)), int(match.group(3)), int(match.group(4))
        good = (written - 60000 <= self._now() * 1000 < ends        # 往回跳过的，也不知道真正过了多久
                or since <= self._clock() * 1000 < since + ends - written)
        return value if good else None

    def _write(self, path, value, ex, claim):
        now = int(self._now() * 1000)
        ends = now + int(min(ex, 10 ** 9) * 1000) if ex else 10 ** 14
        head = '%s %d %d %d\n' % (claim and self._owner() or now, ends, self._clock() * 1000, len(value))
        temporary = '%s.%d.%d.tmp' % (path, os.getpid(), int.from_bytes(os.urandom(8), 'big'))
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as f:
                f.write(head.encode('ascii') + value)
                if not claim:               # 断了电，认领就没有用了
                    f.flush()
                    os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _sweep(self):
        """每分钟至多一次：删掉过期的，和死了的进程留下的。"""
        now = self._now()
        if abs(now - self._swept) < 60:
            return
        self._swept = now
        for entry in os.listdir(self._folder):
            path = os.path.join(self._folder, entry)
            ours = re.fullmatch(r'(owner-[0-9]+-[0-9a-f]+)|[0-9a-f]{40}(\.[0-9]+\.[0-9]+\.tmp)?', entry)
            with contextlib.suppress(OSError):
                if ours and abs(now - os.stat(path).st_mtime) >= 60:
                    owner, temporary = ours.groups()
                    good = self._alive(owner) if owner else self._read(path) is not None
                    if temporary or not good:
                        os.unlink(path)

    @contextlib.contextmanager
    def lock(self, name: str, within: float = 20, kind: str = 'lock') -> 'Iterator[bool]':
        """同一时刻这台机器上只有一个在里面：得到 True；``within`` 秒还轮不到，得
        到 False。

        锁文件一种十六个，从不删除。
        """
        deadline, fd, path, mine = time.monotonic() + within, None, '', False
        with contextlib.suppress(OSError):
            path = self._path(name, kind + '-%.1s')
        mutex = self._locks.setdefault(path, threading.Lock())
        if not mutex.acquire(timeout=within):
            yield False
            return
        try:
            while True:
                try:                        # 只锁 mutex 管着的那个文件，不重新算
                    fd = self._again(_lock_file, path, os.O_CREAT)
                    mine = fd is not None
                except (ImportError, OSError):      # 锁不了文件：只管本进程
                    mine = True
                if mine or time.monotonic() >= deadline:
                    break
                time.sleep(0.01)
            yield mine
        finally:
            if fd is not None:
                os.close(fd)
            mutex.release()

    def get(self, name: str) -> 'Optional[bytes]':
        """``name`` (str) 的值 (bytes)；没有或到期了是 None。"""
        return self._read(self._path(name))

    def _set(self, name, value, ex, nx, claim=False):
        path = self._path(name)
        self._sweep()
        # 等不到的，是停在里面的进程的：没有认领到，过会儿再来。要比 store_within 短，不然就当存储坏了，各跑各的
        with self.lock(name, 0.4) if nx else contextlib.ExitStack() as mine:
            if nx and (not mine or self._read(path) is not None):
                return None
            self._write(path, value, ex, claim)
            return True

    def set(self, name: str, value: bytes, ex: 'Optional[float]' = None, nx: bool = False) -> 'Optional[bool]':
        """同 `MemoryStore.set`。"""
        return self._again(self._set, name, value, ex, nx)

    def delete(self, name: str) -> int:
        """删掉 ``name``；返回删了几条 (int)。"""
        path = self._path(name)
        found = self._read(path) is not None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return int(found)

    def claim(self, name: str, lease: float) -> 'Optional[bool]':
        """认领 ``name``，到这个进程结束为止（锁不了文件时 ``lease`` 秒）；已经有
        记录返回 None。
        """
        return self._again(self._set, name, b'-', lease, True, True)

    def hold(self, name: str, lease: float) -> None:
        """认领还算数：锁不了文件时续租；目录、主人文件被人删过，再写一次。"""
        path = self._path(name)
        if not self._again(self._owner) or self._read(path) is None:
            self._again(self._set, name, b'-', lease, False, True)


_fresh(FileStore, _locks=dict, _owners=dict)    # 锁文件、目录 → 本进程的锁；目录 → 主人文件的（描述符，名字）


class _Steady:
    """别人的、会慢会坏的存储，例如 `redis.Redis`、`FileStore`：在别的线程上问，最多等 ``limits.store_within`` 秒。

    坏了就用内存，说一次；过几秒让一个人去试，好了再用。没有 claim、hold 的，照 `MemoryStore` 的做法。
    """

    retry_after = 5  #: 坏了以后多少秒再试。

    def __init__(self, store, limits):
        self.store, self._limits = store, limits
        self._memory = MemoryStore()    # 坏了的时候记下的，好了以后也还算数
        self._until = 0                 # 坏了：到这时再试；0 是好的
        self._threads = _Threads(16)
        _fresh(self, _lock=threading.Lock)

    def _try(self, job):
        """→（成没成，``job(存储)`` 的结果）。坏了以后，到时候只有一个人去试。"""
        with self._lock:
            probe = self._until
            if probe > time.monotonic():
                return False, None
            self._until = probe and time.monotonic() + self.retry_after
        try:
            result = _within(self._threads, self._limits.store_within, lambda: job(self.store))
        except Exception as e:          # 别人的代码，什么都可能抛
            with self._lock:
                first, self._until = not self._until, time.monotonic() + self.retry_after
            if first:
                logger.error('the store failed：存储坏了，先用内存：%s: %s', type(e).__name__, _show(e))
            return False, None
        if probe:                       # 坏以前就去问了的，不算
            self._until = 0
            logger.warning('the store works again：存储好了')
        return True, result

    def get(self, name):
        value = self._memory.get(name)
        if value is None:
            value = self._try(lambda store: store.get(name))[1]
        return value.encode('utf-8') if isinstance(value, str) else value

    def set(self, name, value, ex=None, nx=False):
        if nx and self._memory.get(name) is not None:
            return None
        done, result = self._try(lambda store: store.set(name, value, ex=ex and int(-(-ex // 1)), nx=nx))
        if not done:
            return self._memory.set(name, value, ex, nx)
        self._memory.delete(name)
        return result

    def delete(self, name):
        return self._memory.delete(name) + (self._try(lambda store: store.delete(name))[1] or 0)

    def claim(self, name, lease):
        if self._memory.get(name) is not None:
            return None
        done, result = self._try(lambda store: getattr(type(store), 'claim', MemoryStore.claim)(store, name, lease))
        return result if done else self._memory.claim(name, lease)

    def hold(self, name, lease):
        if not self._try(lambda store: getattr(type(store), 'hold', MemoryStore.hold)(store, name, lease))[0]:
            self._memory.hold(name, lease)


def _steady(store, limits):
    return store if isinstance(store, (MemoryStore, _Steady)) else _Steady(store, limits)


# ---- 消息 Messages ----------------------------------------------------------------------------
# 回调和 send() 给的东西，展开成一条一条 (_flat)，每条写成一种内部的形式，并且检查一次 (_official)：官方的
# JSON（path/90236、94888），还要上传的文件是 media_id 的位置上的一个 Path。被动回复的 XML（path/90241）
# 最后才从它写出来 (_passive)。

#: 被动回复的类型 →（它的字段，官方 JSON 里的名字）。
_REPLIES = {
    'text': ('Content', 'text'), 'image': ('Image', 'image'), 'voice': ('Voice', 'voice'),
    'video': ('Video', 'video'), 'news': ('Articles', 'news'), 'update_button': ('Button', 'button'),
    'update_template_card': ('TemplateCard', 'template_card'), 'update_taskcard': ('TaskCard', 'taskcard'),
}
#: 官方 JSON 里，被动回复也有的字段；还有别的，就只能主动发送。
_PASSIVE_NAMES = {'content', 'media_id', 'title', 'description', 'articles'}
#: 这些类型的正文最多多少字节；更长的分成几条。群机器人的 markdown 可以长一倍。
_TEXT_LIMITS = {'text': 2048, 'markdown': 2048}
_ROBOT_LIMITS = {'text': 2048, 'markdown': 4096, 'markdown_v2': 4096}

#: 类型 →（最多多少字节，后缀）。
_MEDIA = {'image': (10 << 20, ('.jpg', '.jpeg', '.png')), 'voice': (2 << 20, ('.amr',)),
          'video': (10 << 20, ('.mp4',)), 'file': (20 << 20, ())}

#: 在哪里断开，好的在前：段落、行、句子（连同后面的引号、括号）、分句的后面。
_BREAKS = [re.compile(form) for form in (
    r'\n\s*\n', r'\n',
    '[\u3002\uff01\uff1f\uff1b\u2026!?;]+[\u201d\u2019\u300d\u300f\uff09"\')]*|[.] ', '[,\uff0c\u3001\uff1a ]')]
#: 不从中间断开的：网址，Markdown 的链接，整个 <a>，别的标签，几个码点的一个字（音调、变体、肤色、旗子）。
_WHOLE = re.compile(
    r'(?i)[a-z][a-z0-9+.-]{0,15}://[!#-;=?-_a-~]+|!?\[[^][\n]{0,300}\]\([^()\s]{1,1000}\)'
    r'|<a [^<>]*>[^<]*</a>|<[/!?@]?[a-z0-9][^<>\n]*>|\r\n|[\U0001f1e6-\U0001f1ff]{2}|.(?:\u200d.|'
    '[\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u3099\u309a\ufe00-\ufe0f'
    '\ufe20-\ufe2f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f\U000e0100-\U000e01ef])+')
#: 断在里面，后一段就要重新开始的：代码（``` 的一行），表格（头两行），<font>。
_AGAIN = re.compile(
    r'(?im)^ {0,3}(?P<fence>`{3,}|~{3,})(?P<info>[^`<\n]*)(?:\n|\Z)|(?P<font><font [^<>]*>)|(?P<end></font>)'
    r'|^(?P<head>[^\n|]*\|[^\n]*\n'
    r'(?=[^\n]*\|)[ \t]*(?:\|[ \t]*)?:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*(?:\|[ \t]*)?\n)')
_ROW = re.compile(r'[^\n|]*\|[^\n]*(?:\n|\Z)')


def _markup(text, limit):
    """→ 两个 deque，按先后：[（从，到）：不断在里面], [（从，到，后一段的开头，前一段的结尾）：断在里面就补上]。"""
    whole, lines, again = [m.span() for m in _WHOLE.finditer(text)], [], []
    fence = font = None
    table = 0                       # 最近的表格到哪里为止
    for m in _AGAIN.finditer(text):
        if m.group('fence') and not fence:
            fence = m
            lines.append(m.span())
        elif fence and (m.group('fence') or '').startswith(fence.group('fence')) and not m.group('info').strip():
            again.append((fence.end(), m.start() + 1, fence.group(), '\n' + fence.group('fence')))
            fence = None
            lines.append(m.span())
        elif fence:                 # 代码里的
            continue
        elif m.group('font'):
            font = m
        elif m.group('end') and font:
            again.append((font.end(), m.start() + 1, font.group(), m.group()))
            font = None
        elif m.group('head') and m.start() >= table:
            lines.append(m.span())
            table, row = m.end(), _ROW.match(text, m.end())
            while row and row.group():
                lines.append(row.span())
                table, row = row.end(), _ROW.match(text, row.end())
            again.append((m.end(), table, m.group(), ''))
    if fence:
        again.append((fence.end(), len(text), fence.group(), '\n' + fence.group('fence')))
    whole += [(start, end) for start, end in lines if 4 * (end - start) < limit]
    again = [a for a in again if 4 * len((a[2] + a[3]).encode('utf-8')) < limit]
    return collections.deque(sorted(whole)), collections.deque(sorted(again))


def _where(text, begin, end, whole, again):
    """在 ``begin`` 和 ``end`` 之间哪里断开最好；都不好就是 ``end``。"""
    near = list(itertools.takewhile(lambda span: span[0] < end, whole))
    edges = {edge for a in again if a[0] < end and a[1] > begin for edge in (a[0], a[1] - 1)}     # 补的会是空的
    for form in _BREAKS:
        for m in reversed(list(form.finditer(text, begin + (end - begin) // 2, end))):
            if m.end() not in edges and not any(a < m.end() < b for a, b in near):
                return m.end()
    for a, b in reversed(near):
        if begin < a < end < b:
            end = a
    return end


def _cuts(text, limit):
    """`_split_text`，每段是（它，后一段从哪里开始，后一段的开头）。"""
    begin, head = 0, ''
    if text and len(text.encode('utf-8')) <= limit:
        yield text, len(text), ''
        return
    whole, again = _markup(text, limit)
    while begin < len(text):
        room = limit - len(head.encode('utf-8'))
        piece = text[begin:begin + room]
        if begin + room < len(text) or len(piece.encode('utf-8')) > room:
            room -= max([len(a[3]) for a in again if a[0] < begin + room and a[1] > begin] or [0])
            most = begin + len(piece.encode('utf-8')[:room].decode('utf-8', 'ignore'))
            piece = text[begin:_where(text, begin, most, whole, again)]
        end = begin + len(piece)
        for passed in whole, again:
            while passed and passed[0][1] <= end:
                passed.popleft()
        inside = [a for a in again if a[0] <= end < a[1]]
        before, begin, head = head, end, ''.join(a[2] for a in inside)
        if piece.strip():
            yield before + piece.strip('\r\n') + ''.join(a[3] for a in inside[::-1]), begin, head


def _split_text(text, limit=2048):
    """长文本 → 一段一段的（生成器），每段至多 ``limit`` 字节，段首尾的空行去掉。

    依次在段落、行、句子、分句之后分，找不到才在字与字之间；太靠前的断点不用，免得分得太碎。网址、标签、一个表情不断开；
    断在代码、表格、<font> 里的，前一段补上结尾，后一段补上开头。
    """
    return (piece for piece, _, _ in _cuts(_xml_chars(text), limit))


def _is_file(value):
    return isinstance(value, os.PathLike) or hasattr(value, 'read')


class _Message(dict):
    """内部的形式：官方的 JSON。``own``：是写消息的人自己写的官方 JSON，能主动发送就主动发送。"""
    own = False

    def body(self):
        kind = self['msgtype']
        return self.get(_REPLIES[kind][1] if kind in _REPLIES else kind)

    def file(self):
        """还没有上传的文件（路径，或文件对象）；没有是 None。"""
        body = self.body()
        file = body.get('media_id') if isinstance(body, dict) else None
        return file if _is_file(file) else None

    def with_body(self, **fields):
        new = _Message(self, **{_REPLIES.get(self['msgtype'], (0, self['msgtype']))[1]: dict(self.body(), **fields)})
        new.own = self.own
        return new


def _need(condition, rule):
    if not condition:
        raise TypeError(rule)


_FENCE = re.compile(' {0,3}(`{3,}|~{3,})')


class _Paragraph(str):
    """`Stream` 的一段：还没有发的几段，合成一条。"""


class Stream:
    """回调返回的，一段会长的文字，例如大模型的回答：

        @server.register_callback('text')
        def chat(msg):
            return Stream(piece for piece in llm(msg['Content']))

    ``pieces`` 是 str 的 iterable 或 async iterable，依次接起来是全文。智能机
    器人里是一个越来越长的气泡；应用里第一段写完了马上发，别的一段一段地发，等
    着发的接成一条。不是 iterable 的抛 `TypeError`。
    """
    def __init__(self, pieces: 'Union[Iterable[str], AsyncIterable[str]]') -> None:
        if not hasattr(pieces, '__iter__') and not hasattr(pieces, '__aiter__'):
            raise TypeError('Stream 里要放一块一块的 str（列表、生成器），得到的是 %s' % type(pieces).__name__)
        self._pieces = [pieces] if isinstance(pieces, str) else pieces

    def pieces(self, under_way: 'Optional[Set[Any]]' = None) -> 'Iterator[str]':
        """一块一块的（生成器，str）；不是 str 的抛 `TypeError`。"""
        pieces = self._pieces
        if hasattr(pieces, '__aiter__'):
            pieces = _LOOP.each(pieces, set() if under_way is None else under_way)
        for piece in pieces:
            _need(isinstance(piece, str), 'Stream 里的每一块都要是 str，得到的是 %s' % type(piece).__name__)
            yield _xml_chars(piece)

    def paragraphs(self, under_way: 'Optional[Set[Any]]' = None) -> 'Iterator[str]':
        """一段一段的（生成器，str），写完一段给一段；代码 (```) 里的空行不分段。"""
        line: 'List[str]' = []
        lines: 'List[str]' = []
        fence = ''
        for piece in itertools.chain(self.pieces(under_way), '\n\n'):
            for n, part in enumerate(piece.split('\n')):
                if n:
                    text = ''.join(line)
                    mark = _FENCE.match(text)
                    if mark:
                        fence = '' if fence and mark.group(1).startswith(fence) else fence or mark.group(1)
                    if fence or text.strip():
                        lines.append(text)
                    elif lines:
                        yield _Paragraph('\n'.join(lines))
                        lines = []
                    line = []
                line.append(part)
        if lines:
            yield _Paragraph('\n'.join(lines))


_TAG = re.compile('<[/!?]?[A-Za-z][^<>]*>')


def plain_text(text: str) -> str:
    """别人起的名字、写的字 (str) → 没有标签的：文本消息里的 ``<a href=…>`` 是能
    点的链接。
    """
    return _TAG.sub(lambda m: '\uff1c' + m.group()[1:], _TAG.sub('', text))    # 去掉一层，里面的又成了一个：不要它的 <


def _is_several(result):
    """是几条（list、tuple、生成器），不是一条。"""
    return isinstance(result, (list, tuple)) or hasattr(result, '__next__') and not _is_file(result)


def _flat(result):
    """send() 的参数 → 一条一条（生成器），去掉 None。"""
    if isinstance(result, Stream):
        result = result.paragraphs()
    if _is_several(result):
        for item in result:
            yield from _flat(item)
    elif result is not None:
        yield result


def _snake_case(value):
    """被动回复的 CamelCase 名字 → 官方 JSON 的，连同里面的。"""
    if isinstance(value, dict):
        names = ((re.sub('(?<!^)(?=[A-Z])', '_', k).lower(), v) for k, v in value.items())
        return {re.sub('^(key)_(?=name)|^(app|user)_(?=id)|^(page)_(?=path)', r'\1\2\3', k):
                _snake_case(v) for k, v in names}
    return [_snake_case(v) for v in value] if isinstance(value, (list, tuple)) else value


_CAMEL = {'keyname': 'KeyName', 'appid': 'AppId', 'userid': 'UserId', 'pagepath': 'PagePath', 'picurl': 'PicUrl'}


def _camel_case(value, inside=''):
    """`_snake_case` 的反函数；quote_area 里的 appid 在 XML 里是 Appid（path/90241）。"""
    if isinstance(value, dict):
        names = ((k, 'Appid' if (inside, k) == ('quote_area', 'appid') else _CAMEL.get(k) or re.sub(
            '(?:^|_)(.)', lambda m: m.group(1).upper(), k)) for k in value)
        return {name: _camel_case(value[k], k) for k, name in names}
    return [_camel_case(v, inside) for v in value] if isinstance(value, list) else value


def _reply_body(kind, item):
    """被动回复的写法里，``kind`` 自己的那部分 → 官方 JSON 的 dict；别的字段（原样返回的 MsgId）不要。"""
    name = _REPLIES[kind][0]
    value = item.get(name)
    if kind == 'text':
        if isinstance(value, (str, int, float)):
            return {'content': str(value)}
        raise TypeError('text 的回复要有 Content，一个 str')
    if value is None and 'MediaId' in item and kind in _MEDIA:
        value = item
    if kind == 'news':
        value = value.get('item') if isinstance(value, dict) else value
        value = [value] if isinstance(value, dict) else value
        _need(isinstance(value, (list, tuple)) and 1 <= len(value) <= 8 and all(isinstance(a, dict) for a in value),
              'Articles 应该是 1 到 8 个 dict 的 list')
        return {'articles': [{k.lower(): v for k, v in a.items()} for a in value]}
    _need(isinstance(value, dict) and value, '%s 的回复要有 %s，一个 dict' % (kind, name))
    if kind in _MEDIA:
        _need(isinstance(value.get('MediaId'), str) or _is_file(value.get('MediaId')), '%s needs MediaId, a str' % name)
        value = {k: value[k] for k in ('MediaId', 'Title', 'Description') if k in value}
    return _snake_case(value)


def _from_reply(item, default):
    """被动回复的写法（``{'Content': …}``、``{'MsgType': 'image', 'MediaId': …}``）→ 官方 JSON。"""
    if item.get('response_type') == 'update_template_card':     # 智能机器人的写法 (path/101463)
        _need(isinstance(item.get('template_card'), dict), 'update_template_card 要有 template_card，一个 dict')
        return _Message({key: item[key] for key in ('template_card', 'userids') if key in item},
                        msgtype='update_template_card')
    if item.get('MsgType') == 'file' and isinstance(item.get('MediaId'), str):      # 没有这样的被动回复：主动发送
        return _Message(msgtype='file', file={'media_id': item['MediaId']})
    kind = item.get('MsgType') or next((k for k, (name, _) in _REPLIES.items() if name in item), default)
    if not isinstance(kind, str) or kind not in _REPLIES:
        raise TypeError('被动回复没有 %s 这种类型，有的是：%s' % (_show(repr(kind)), ', '.join(_REPLIES)))
    return _Message({'msgtype': kind, _REPLIES[kind][1]: _reply_body(kind, item)})


def _passive(message, user, corp, now):
    """→ 被动回复的 XML (bytes)；没有这样的被动回复是 None。"""
    kind, body = message['msgtype'], message.body()
    if kind not in _REPLIES or kind in _MEDIA and message.file() or message.own and (
            len(message) > 2 or not isinstance(body, dict) or set(body) - _PASSIVE_NAMES):
        return None
    reply = {'ToUserName': user, 'FromUserName': corp, 'CreateTime': int(now), 'MsgType': kind}
    if kind == 'text':
        reply['Content'] = body['content']
    elif kind == 'news':
        reply['ArticleCount'] = len(body['articles'])
        reply['Articles'] = {'item': _camel_case(body['articles'])}
    else:
        reply[_REPLIES[kind][0]] = _camel_case(body)
    return dict_to_xml(reply).encode('utf-8')


def _message_of(item, default):
    """一条 → `_Message`，检查过了：官方 JSON 和被动回复，都写一遍试试。"""
    if isinstance(item, str):
        return _Message(msgtype='text', text={'content': item})
    if isinstance(item, _Message):
        return item
    if not isinstance(item, dict):
        raise TypeError("bytes 没有文件名：用 client.upload(data, name='photo.jpg')" if isinstance(
            item, (bytes, bytearray)) else '要 str、dict、Path，或它们的 list，得到的是 %s' % type(item).__name__)
    own = 'msgtype' in item and 'MsgType' not in item       # 智能机器人的消息，原样返回的，两样都有
    message = _Message(item) if own else _from_reply(item, default)
    if own:
        message.own = True
        _need(isinstance(item['msgtype'], str), 'msgtype 应该是 str')
        json.dumps(item, allow_nan=False, default=lambda value: _need(      # 不是 JSON 的，只有还没上传的文件可以
            _is_file(value), '消息里不能有 %s' % type(value).__name__))
    if message['msgtype'] != 'text':
        _passive(message, '', '', 0)
    return message


def _official(item, default='text', limits=_TEXT_LIMITS):
    """一条 (str、被动回复的写法、官方 JSON) → `_Message` 的 list：长文本是几条。

    写错了的抛 `TypeError`、`ValueError`、`FormatException`，空白的 `APIError` (44004)。
    ``default`` 是没写 MsgType 的 dict 的类型。
    """
    message = _message_of(item, default)
    kind, body = message['msgtype'], message.body()
    if kind not in limits:
        return [message]
    content = body.get('content') if isinstance(body, dict) else None
    if not isinstance(content, str):
        raise TypeError('%s 要有 content，一个 str' % kind)
    if not content.strip(_BLANKS):
        raise APIError(44004, '文本是空白的；什么也不想说就返回 None', 'message/send')
    if 4 * len(content) <= limits[kind] and content.isprintable():     # 多半：不必分，也没有要去掉的
        return [message]
    return [message.with_body(content=part) for part in _split_text(content, limits[kind])]


class _JsonMessage(dict):
    """用 JSON 写的消息（path/92052）：没有被动回复。智能机器人的 (path/100719)，``bot`` 为真。"""
    bot, line, req_id = False, None, ''     # 长连接上来的：哪条连接，req_id


def _check_direction(msg, receive_id):
    """签名不说是谁写的：只收来的消息。我们自己的回复，被人原样发回来，也验得过签名。"""
    names = {k.lower(): v for k, v in msg.items()}
    sender, receiver = (str(names.get(k) or '').lower() for k in ('fromusername', 'tousername'))
    if 'msgtype' in msg and not sender + receiver:      # 智能机器人的 JSON（path/100719）：我们的回复没有这些
        missing = [k for k in ('msgid', 'aibotid', 'from') if not msg.get(k)]
        if missing:
            raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, 'no message：解密出来的没有 %s' % '、'.join(missing))
    elif receive_id.lower() in ('', sender) or receiver not in ('', receive_id.lower()):
        raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, 'our own answer, sent back：不是给 %s 的，从 %s 到 %s，'
                          '多半是有人把我们的回复发了回来，不用管' % (
                              _mask(receive_id), _show(_mask(sender)), _show(_mask(receiver))))


def _read_message(text, receive_id):
    """解密了的 XML 或 JSON 文档 (str) → 发给 ``receive_id`` 的消息 (dict)；读不懂的、不是的抛 `CryptoError`。"""
    try:
        msg = _JsonMessage(json_to_dict(text.encode('utf-8'))) if text.lstrip()[:1] == '{' else xml_to_dict(text)
    except (FormatException, ValueError, RecursionError) as e:
        raise CryptoError(ierror.WXBizMsgCrypt_IllegalBuffer, getattr(e, 'errmsg', None) or
                          'cannot read JSON：%s' % _show(e)) from None
    logger.debug('message %s', _Shown(msg))
    _check_direction(msg, receive_id)
    return msg


def _created(msg):
    """消息自己的时刻（Unix 秒）；没有是 None。"""
    text = str(msg.get('CreateTime') or msg.get('create_time') or '')
    return int(text) if _TIMESTAMP.fullmatch(text) else None


class _Keys:
    """消息在存储里的名字：同一条消息的每次投递都一样，别的消息、别的应用不一样。"""
    def __init__(self, settings):
        self._app = ''.join(settings[k] + '\0' for k in ('corpid', 'agentid', 'token'))
        self._seconds = {}              #（谁，何时，什么）→ 那个事件的名字

    def of(self, msg):
        """有 MsgId 的看它和发送者，没有的（事件）看全部内容：企业微信再投递的，内容一样（假定；日志里看得出来）。"""
        event = not msg.get('MsgId')
        whole = json.dumps(msg, sort_keys=True) if event else '%s\0%s' % (msg['MsgId'], msg.get('FromUserName'))
        if getattr(msg, 'bot', False):
            whole = 'aibot:%s\0%s' % (msg['ToUserName'], whole)
        key = 'easywechat:message:' + hashlib.sha256((self._app + whole).encode('utf-8', 'replace')).hexdigest()
        if event:
            if len(self._seconds) > 100:
                self._seconds.clear()
            second = tuple(str(msg.get(k)) for k in ('FromUserName', 'CreateTime', 'MsgType'))
            if self._seconds.setdefault(second, key) != key:
                logger.debug('two events of one second: %s', _show(second))
        return key


# ---- 请求 Requests ----------------------------------------------------------------------------
# 一个 HTTP 请求 (_Attempt)：在别的线程上，时限是总数，随时能打断；别的程序用 `fetch`。一次调用 (_Call)：几次尝试，
# 一个总的时限，只重试肯定没到的。GET 或 POST https://qyapi.weixin.qq.com/cgi-bin/<path>?<query>，JSON 或 multipart；
# 回答 {"errcode": 0, "errmsg": "ok", …}（path/90313）。

_API_BASE = 'https://qyapi.weixin.qq.com'
_NETWORK_ADVICE = (
    ('^(ImportError|ModuleNotFoundError|AttributeError):', '这个 Python 没有 ssl：opkg install python3-openssl'),
    ('certificate (is not yet valid|has expired)', '多半是这台机器的时钟不对：先校时 (NTP)'),
    ('unable to get (local )?issuer|self.signed', '没有 CA 证书：opkg install ca-bundle，或 apt / apk '
     'install ca-certificates；中转用自己的证书时，在 config.ini 里写 ca_file'),
    ('(?i)mismatch|hostname', '证书不是这个域名的：看地址写对没有'),
    ('CERTIFICATE_VERIFY_FAILED', '证书验证不了：时钟不对 (NTP)，没有 CA 证书 (ca-bundle、ca-certificates)，地址'
     '不是这个域名，或中转用自己的证书 (ca_file)'),
    ('getaddrinfo|Name or service|name resolution|not known', 'DNS 查不到：看网络通不通，地址写对没有'),
    ('(?i)SOCKS|代理不行', '代理 (https_proxy、all_proxy) 要是 http:// 的，例如 privoxy；'
     '或把 qyapi.weixin.qq.com 写进 no_proxy'),
    ('WRONG_VERSION_NUMBER|RECORD_LAYER', '那里是明文的 http，不是 https：看网址写对没有'),
    ('Tunnel connection failed|proxy', '代理拒绝了：看环境变量 https_proxy'),
    ('没有 WebSocket|不是 HTTP', 'bot_url 写错了，或中间的代理不让 WebSocket 过'))
_STATUS_ADVICE = {301: '中转要的是 https，照它改 api_base', 302: '中转要的是别的地址，照它改 api_base',
                  413: '中转嫌文件大，nginx 里写 client_max_body_size 21m'}

# 被放弃的请求（比如 DNS 不答）还占着一条，直到它自己结束；别的网站的 (`fetch`) 不占企业微信的
_REQUESTS, _FETCHES = _Threads(64), _Threads(64)


def _normal_base(text):
    """api_base 的各种写法 → ``https://host[:port][/prefix]``。"""
    base = re.sub('(/cgi-bin)?/*$', '', text if '://' in text else 'https://' + text)
    form = r'https?://([A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?(/[!-~]*)?'
    match = re.fullmatch(form, base)
    if not match or int(match.group('port') or 0) > 65535 or re.search('[?#@]', base):
        raise ConfigError('api_base 应该像 https://vps.example.com[:端口][/路径]')
    return base


def _connection(name, attempt, *args, **kwargs):
    """http.client 里叫 ``name`` 的连接，连上了告诉 ``attempt``；没有 ssl 的 Python 没有 HTTPSConnection。"""
    connection = getattr(http.client, name)(*args, **kwargs)

    def connect():
        del connection.connect          # 又是类的那个；不留下循环引用
        connection.connect()            # 包括代理的 CONNECT 和 TLS 握手
        attempt.connected_by(connection.sock)
    connection.connect = connect
    return connection


def _tls(ca_file):
    import ssl
    context = ssl.create_default_context()
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except OSError as e:
        raise ConfigError('用不了 ca_file %s：%s；它应该是一个 PEM 文件' % (ca_file, e.strerror or e)) from None
    return context


def _make_opener(ca_file, proxies=None):
    """urllib 的 opener：只有 http 和 https；不跟随重定向，什么状态都原样返回。``proxies`` 默认是标准的环境变量里的。"""
    from urllib import request as web
    proxies = web.getproxies() if proxies is None else proxies
    if proxies.get('all'):
        proxies = dict({'http': proxies['all'], 'https': proxies['all']}, **proxies)
    _remember(*(m.group(1) for m in (re.search('([^/@]*:[^/@]*)@', url) for url in proxies.values()) if m))

    class Proxy(web.ProxyHandler):
        def proxy_open(self, req, proxy, kind):
            if proxy.lower().startswith('socks') and not (req.host and web.proxy_bypass(req.host)):
                raise OSError('SOCKS 代理不行，要 http:// 的')
            return super().proxy_open(req, proxy, kind)

    class Transport(web.HTTPHandler):
        https_request = web.HTTPHandler.http_request
        tls = None

        def http_open(self, req):
            return self.do_open(functools.partial(_connection, 'HTTPConnection', req.attempt), req)

        def https_open(self, req):
            self.tls = self.tls or _tls(ca_file)
            return self.do_open(functools.partial(_connection, 'HTTPSConnection', req.attempt), req, context=self.tls)
    opener = web.OpenerDirector()
    opener.addheaders = [('User-Agent', 'EasyWeChat')]
    opener.add_handler(Proxy(proxies))
    opener.add_handler(Transport())
    return opener


def _blocks(response, limit):
    """正文，一块一块的；超过 ``limit`` 字节，或比 Content-Length 短，抛 `OSError`。"""
    length, got = response.headers.get('Content-Length'), 0
    for block in iter(functools.partial(response.read, 1 << 16), b''):
        got += len(block)
        if got > limit:
            raise OSError('回答超过 %d 字节' % limit)
        yield block
    if length and re.fullmatch('[0-9]{1,15}', length) and got < int(length):
        raise OSError('回答断了，%d / %s 字节' % (got, length))


def _read_json(call, response):
    """企业微信的回答 (dict)；回答的不是企业微信，抛 `NetworkError` (502)。"""
    data = b''.join(_blocks(response, call.caller.max_answer))
    with contextlib.suppress(ValueError, RecursionError):
        answer = json_to_dict(data)
        if response.status == 200 and isinstance(answer.get('errcode', 0), int):
            return answer
    status, kind = response.status, _show(response.headers.get('Content-Type'))
    raise NetworkError(
        502, '%s 返回 %d %s，不是企业微信的 JSON' % (call.host, status, kind), call.path,
        '%s 回答的不是企业微信：%s' % (call.host, _STATUS_ADVICE.get(
            status, '中转没有转发 /cgi-bin/%s，让它转发整个 /cgi-bin/，不改路径' % call.path)),
        (status == 200 or status >= 500) and not call.harmless)


class _Local(Exception):
    """本机的错（文件没了、磁盘满了），不是网络的：``args`` 里是那个 `OSError`。"""


@contextlib.contextmanager
def _local():
    try:
        yield
    except OSError as e:
        raise _Local(e) from None


class _File:
    """要上传的：路径、二进制的文件对象、bytes。``name`` 是文件名，``suffix`` 像 ``.jpg``，``size`` 是字节。"""
    def __init__(self, source, name=None):
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = io.BytesIO(source)
        _need(not isinstance(source, io.TextIOBase), "文件对象要用 'rb' 打开")
        self._source, is_path = source, not hasattr(source, 'read')
        path = os.fsdecode(source) if is_path else getattr(source, 'name', None)
        path = path if isinstance(path, str) else name
        _need(path, "没有文件名的要给一个：upload(data, name='photo.jpg')")
        self.name, self.suffix = os.path.basename(name or path), os.path.splitext(path)[1].lower()
        if is_path and os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.size = os.path.getsize(path) if is_path else source.seek(0, os.SEEK_END)

    @contextlib.contextmanager
    def open(self):
        """→ 打开了的，从头开始；别人的文件对象不关。"""
        if hasattr(self._source, 'read'):
            self._source.seek(0)
            yield self._source
        else:
            with open(self._source, 'rb') as f:
                yield f


class _Upload:
    """``multipart/form-data`` 里的一个 `_File`，边读边发；每次迭代都从头。"""
    def __init__(self, file, progress):
        self._file, self._progress = file, progress
        boundary = 'EasyWeChat' + binascii.hexlify(os.urandom(16)).decode()
        escapes = str.maketrans({'"': '%22', '\r': '%0D', '\n': '%0A', '\\': '_'})
        name = _UNPRINTABLE.sub('_', _decoded(file.name).translate(escapes))
        self._head = ('--%s\r\nContent-Disposition: form-data; name="media"; filename="%s"; filelength=%d\r\n'
                      'Content-Type: application/octet-stream\r\n\r\n' % (boundary, name, file.size)).encode('utf-8')
        self._tail = ('\r\n--%s--\r\n' % boundary).encode()
        length = len(self._head) + file.size + len(self._tail)
        self.headers = {'Content-Type': 'multipart/form-data; boundary=' + boundary, 'Content-Length': str(length)}

    def __iter__(self):
        sent = 0
        with _local(), self._file.open() as f:
            yield self._head
            for block in iter(functools.partial(f.read, 1 << 16), b''):
                sent += len(block)
                if sent > self._file.size:
                    break
                yield block
                if self._progress:
                    self._progress(sent, self._file.size)
            if sent != self._file.size:
                raise OSError(errno.EBUSY, '发送的时候文件变了', self._file.name)
        yield self._tail


def _media_kind(file, kind=None):
    """`_File` 按后缀和大小该当作什么发；``kind`` 给了就检查它。不合规定抛 `APIError`。"""
    if kind not in _MEDIA and kind is not None:
        raise APIError(40004, '没有 %r 这种类型，有的是：%s' % (kind, '、'.join(_MEDIA)), 'media/upload')
    if kind is None:
        fits = (k for k, (most, suffixes) in _MEDIA.items() if file.suffix in suffixes and file.size <= most)
        kind = next(fits, 'file')
    most, suffixes = _MEDIA[kind]
    if file.size <= 5:
        raise APIError(44001, '%s 只有 %d 字节，要大于 5 字节' % (file.name, file.size), 'media/upload')
    if file.size > most:
        raise APIError(40006, '%s 有 %d 字节，%s 最多 %d' % (file.name, file.size, kind, most), 'media/upload')
    if suffixes and file.suffix not in suffixes:
        raise APIError(40005, '%s：%s 只收 %s' % (file.name, kind, '、'.join(suffixes)), 'media/upload')
    return kind


def _made(item, default='text', limits=_TEXT_LIMITS):
    """`_official`，也收 Path、文件对象：按后缀和大小是图片、语音、视频或文件，还没有上传。"""
    if not isinstance(item, (str, dict)) and _is_file(item):
        kind = _media_kind(_File(item))
        return [_Message({'msgtype': kind, kind: {'media_id': item}})]
    return _official(item, default, limits)


#: Python 和 shell（Windows 的也在内）会运行的，和自己会去读的。
_RUNNABLE = re.compile(
    r'(?i)^config\.ini$|\.(py[a-z]?|pyzw|_?pth|egg|so|dll|dylib|(ba|z|k|c|tc|fi)?sh|command|desktop|bat|cmd|com|exe|msi|scr'
    r'|pif|lnk|cpl|ps1|vb[se]?|jse?|ws[fh]|msc|hta|reg|jar)$')


#: 没有后缀的文件，按 Content-Type 给它。
_SUFFIXES = {'audio/amr': '.amr', 'image/jpeg': '.jpg', 'image/png': '.png', 'video/mp4': '.mp4'}


def _name_in(headers):
    """Content-Disposition 里的文件名，没有是 None。http.client 把 UTF-8 读成了 latin-1：先改回来，再解析。"""
    import email.message
    value = headers.get('Content-Disposition') or ''
    with contextlib.suppress(UnicodeError):
        value = value.encode('latin-1').decode('utf-8')
    parsed = email.message.Message()
    parsed['Content-Disposition'] = value
    return parsed.get_filename()


def _file_name(text, kind):
    """一个文件名的最后一段，去掉危险的和看不见的；没有的部分按类型 ``kind`` 给。"""
    name = _UNPRINTABLE.sub('', re.split(r'[/\\]', text)[-1]).lstrip(' ').rstrip(' .')
    stem, suffix = os.path.splitext(re.sub('[<>:"|?*]', '_', name))
    if any(stem.lower() in suffixes for _, suffixes in _MEDIA.values()):        # '.amr'：只有后缀
        stem, suffix = '', stem
    stem, suffix = stem.lstrip(' .'), suffix or _SUFFIXES.get(kind, '')
    if re.fullmatch('(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]', stem.partition('.')[0]):
        stem = '_' + stem
    suffix = suffix.encode('utf-8')[:20].decode('utf-8', 'ignore')
    stem = stem.encode('utf-8')[:110 - len(suffix.encode('utf-8'))].decode('utf-8', 'ignore')
    stem = stem or {'audio': 'voice', 'image': 'image', 'video': 'video'}.get(kind.partition('/')[0], 'file')
    return os.fsdecode((stem + suffix).encode('utf-8'))     # LANG=C 时也是 UTF-8


def _save(f, default, call, response):
    """把下载的文件写进 ``f`` → ``{'name': 文件名}``；没有 Content-Disposition 的是 JSON 的错误。"""
    if response.status != 200 or not response.headers.get('Content-Disposition'):
        return _read_json(call, response)
    f.seek(0)
    for block in _blocks(response, call.caller.max_download):
        with _local():
            f.write(block)
    f.truncate()
    return {'name': _file_name(_name_in(response.headers) or default, response.headers.get_content_type())}


def _put(part, folder, name):
    """``part`` 改成 ``folder`` 里一个还没有的名字 → 路径。"""
    stem, suffix = os.path.splitext(name)
    for n in range(10000):
        path = os.path.join(folder, '%s%s%s' % (stem, '-%d' % n if n else '', suffix))
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.replace(part, path)
            return path
    raise FileExistsError(errno.EEXIST, '叫这个名字的文件太多了', name)


def _saved(folder, write):
    """``write(f)`` 写进 ``folder`` 里的一个临时文件，返回它的名字 → `pathlib.Path`。"""
    import pathlib
    folder = os.fspath(_private([os.path.join(state_folder(), 'downloads')]) if folder is None else folder)
    part = os.path.join(folder, '.easywechat-%s.part' % binascii.hexlify(os.urandom(8)).decode())
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), 'wb') as f:
            name = write(f)
        return pathlib.Path(_put(part, folder, name + '_' * bool(_RUNNABLE.search(name))))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


class _Attempt:
    """一个 HTTP 请求，``within`` 秒是总数：走到了哪一步，怎样打断它。还没有 ``socket`` 就失败的，肯定没有到。"""
    def __init__(self, threads, opener, url, body, headers, within, connect_within=5, redirects=0):
        self._threads, self._opener, self._url, self._body, self._headers = threads, opener, url, body, headers
        self._end, self._connect_within, self._redirects = time.monotonic() + within, connect_within, redirects
        self._lock, self._aborted = threading.Lock(), False
        self.socket = None

    def connected_by(self, sock):
        """连上了；等的人已经走了，就不许再发出去。"""
        sock.settimeout(max(0.001, self._end - time.monotonic()))
        with self._lock:
            if self._aborted:
                raise OSError('太晚了')
            self.socket = sock

    def open(self):
        """→ `http.client.HTTPResponse`，状态和头部到了；跟随至多 ``redirects`` 次重定向，从不去更差的协议。"""
        from urllib.request import Request
        url = self._url
        for left in range(self._redirects, -1, -1):
            request = Request(url, self._body, self._headers)
            request.attempt = self
            response = self._opener.open(request, timeout=self._connect_within)
            where = response.headers.get('Location')
            if response.status not in (301, 302, 303, 307, 308) or not where or not left:
                return response
            response.close()
            where = urllib.parse.urljoin(url, where)
            if not where.startswith(('https://', url.partition('//')[0] + '//')):
                raise OSError('被转到了不加密的网址')
            url = where

    def hang_up(self):
        """断开；fork 出来的进程里的那一份也断开。"""
        with self._lock:
            self._aborted = True        # 还没连上的，连上了也不发
        if self.socket:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def do(self, job, most=float('inf')):
        """这个请求的一步 ``job()``，在别的线程上 → 它的结果，或抛它抛的。

        总的时间到了，或这一步过了 ``most`` 秒，断开，抛 `socket.timeout`。
        """
        try:
            return _within(self._threads, min(most, self._end - time.monotonic()), job)
        except socket.timeout:
            self.hang_up()
            raise


def _failure(error, host, connected, path='', harmless=True):
    """urllib 的各种异常，或开不出线程 (RuntimeError) → `NetworkError`，其中没有网址。"""
    reason = getattr(error, 'reason', None) or error
    text = _show('%s: %s' % (type(reason).__name__, reason), 400)
    advice = next((a for form, a in _NETWORK_ADVICE if re.search(form, text)), '')
    text = '%s (%s)' % (host, text)
    if connected:
        return NetworkError(504, 'no complete answer from ' + text, path, '%s 没有回答完：%s' % (host, advice or (
            '过一会儿再试' if harmless else '消息可能已经到了，先看一眼再重发')), not harmless)
    return NetworkError(503, 'cannot reach ' + text, path, '连不上 %s：%s' % (
        host, advice or '看网络通不通、地址和代理 (https_proxy) 写对没有'))


#: 一个请求会抛的：网络的，urllib 和 http.client 的，没有 ssl 的，开不出线程的。
_FAILURES = OSError, http.client.HTTPException, ValueError, ImportError, AttributeError, RuntimeError


class _Answer:
    """`fetch` 的回答：``status`` (int)、``headers``，和还没有读的正文。"""
    status: int
    headers: http.client.HTTPMessage

    def __init__(self, attempt, host, idle):
        self._attempt, self._host, self._idle = attempt, host, idle
        self._response = self._do(attempt.open)
        self.status, self.headers, self.close = self._response.status, self._response.headers, self._response.close

    def _do(self, job, most=float('inf')):
        try:
            return self._attempt.do(job, most)
        except _FAILURES as e:
            failure = _failure(e, self._host, self._attempt.socket)
        raise failure       # 在 except 以外：不把带着网址的异常挂在后面

    def read(self, most: int = 2 << 20) -> bytes:
        """正文 (bytes)；超过 ``most`` 字节、短了的是错误。"""
        return self._do(lambda: b''.join(_blocks(self._response, most)))

    def __iter__(self) -> 'Iterator[bytes]':
        """一行一行 (bytes，至多 64 KiB)，到了就给。"""
        return iter(lambda: self._do(lambda: self._response.readline(1 << 16), self._idle), b'')


def _split_url(url):
    """→ `urlsplit` 的结果；不能去问的抛 `ValueError`。"""
    with contextlib.suppress(ValueError):       # 端口、方括号
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0 and re.fullmatch('[!-~]+', url):
            return parts
    raise ValueError('这不是能问的网址：%s（要写全 http:// 或 https://）' % _show(url))


@contextlib.contextmanager
def fetch(url: str, body: 'Optional[bytes]' = None, headers: 'Optional[Mapping[str, str]]' = None, within: float = 15,
          idle: float = float('inf'), proxies: 'Optional[Mapping[str, str]]' = None) -> 'Iterator[_Answer]':
    """别的网站的一个 HTTP 请求；不管对方多慢，``within`` 秒是总数，DNS、连接、正
    文都在内，走一个字节不会重新计时。

        with easywechat.fetch('https://example.com/api', within=15) as answer:
            print(answer.status, answer.headers['Content-Type'], answer.read())     # 或 for line in answer: …

    ``body`` (bytes) 给了就是 POST；一行一行读的时候，等一行至多 ``idle`` 秒。
    ``proxies`` (dict) 默认是环境变量里的，``{}`` 是直连。不跟随重定向，什么状
    态都是回答。没有（完整的）回答抛 `NetworkError`，网址写错了抛
    `ValueError`。
    """
    host = _split_url(url).netloc.rpartition('@')[2]
    attempt, answer = _Attempt(_FETCHES, _make_opener('', proxies), url, body, headers or {}, within), None
    try:
        answer = _Answer(attempt, host, idle)
        yield answer
    finally:
        attempt.hang_up()
        if answer:
            answer.close()


class _Call:
    """一次调用。``within`` 秒是总数，连同重试；``read(call, response)`` 读回答。"""
    def __init__(self, caller, path, query, body=None, read=_read_json, within=None):
        self.caller, self.path, self.read = caller, path, read
        self.url = '%s/cgi-bin/%s?%s' % (caller.api_base, path, urllib.parse.urlencode(query))
        self.host = urllib.parse.urlsplit(caller.api_base).netloc
        self._redirects = 3 * (read is not _read_json)
        self._within = caller.call_within if within is None else within
        self.harmless = body is None or isinstance(body, _Upload)       # 再来一次也没关系
        self.body, self.headers = body, getattr(body, 'headers', {})
        if not self.harmless:
            self.body = json.dumps(body, ensure_ascii=False).encode('utf-8', 'replace')
            self.headers = {'Content-Type': 'application/json; charset=utf-8'}

    def _exchange(self, attempt):
        try:
            with contextlib.closing(attempt.open()) as response:
                return self.read(self, response)
        finally:
            attempt.hang_up()

    def _try(self, within):
        caller = self.caller
        attempt = _Attempt(_REQUESTS, caller._urllib(), self.url, self.body, self.headers, within,
                           caller.connect_within, self._redirects)
        try:
            answer = attempt.do(functools.partial(self._exchange, attempt))
        except _Local as e:
            failure = e.args[0]
        except _FAILURES as e:
            failure = _failure(e, self.host, attempt.socket, self.path, self.harmless)
        else:
            if not answer.get('errcode'):
                return answer
            failure = APIError(answer['errcode'], _show(answer.get('errmsg') or 'no errmsg', 400), self.path)
        raise failure       # 在 except 以外：不把带着网址的异常挂在后面

    def run(self):
        """→ 回答 (dict)。只有肯定没到的 (503) 和企业微信叫再来的 (-1) 才重试。"""
        caller = self.caller
        begin, pause = caller._clock(), caller.pause
        for n in itertools.count(1):
            left = begin + self._within - caller._clock()
            try:
                return self._try(max(left, min(1, caller.call_within) if n <= caller.tries else caller.call_within))
            except APIError as e:
                failure = e
            then = caller._clock() + pause
            again = failure.errcode in (-1, 503) and n < caller.tries and then < begin + self._within
            if not again and (getattr(failure, 'maybe_sent', True) or then > begin + caller.retry_within):
                raise failure
            logger.info('%s；%g 秒后再试', failure, pause)
            caller._sleep(pause)
            pause = min(2 * pause, 60)


# ---- 主动模式 Client --------------------------------------------------------------------------
# 消息绝不因为重试变成两条。POST /cgi-bin/message/send?access_token=…  {"touser": …，"msgtype": …}
# token 见 path/91039，素材见 path/90253，群机器人见 path/91770。

class _Pace:
    """每个收件人一分钟、一小时最多几条：再多的等。"""
    def __init__(self, sleep):
        self._slots = collections.OrderedDict()     # 收件人 → 还算数的 [时刻]，最近用过的收件人在后
        self._sleep = sleep
        _fresh(self, _lock=threading.Lock)

    def turn(self, receivers, limits, clock):
        """占一个格子 →（它，还要等多少秒）；``limits`` 是 {秒：最多几条}。同一个收件人的先来先走。"""
        _check_fork()
        slot, longest = [clock()], max(limits)
        with self._lock:
            now = slot[0]
            while self._slots and next(iter(self._slots.values()))[-1][0] < now - longest:
                self._slots.popitem(last=False)
            for who in receivers:
                slots = self._slots.setdefault(who, [])
                self._slots.move_to_end(who)
                while slots and slots[0][0] < now - longest:
                    del slots[0]
                full = [slots[-most][0] + seconds for seconds, most in limits.items() if len(slots) >= most]
                slot[0] = max([slot[0]] + full + [last[0] for last in slots[-1:]])
                slots.append(slot)
        if slot[0] > now:
            logger.warning('waiting %.0f s：企业微信给一个收件人最多%s，多的在等', slot[0] - now, '、'.join(
                '%d 秒 %d 条' % (seconds, most) for seconds, most in limits.items()))
        return slot, slot[0] - now

    def wait(self, receivers, limits, clock):
        """`turn`，轮到的时候返回格子：发到了，把 ``[0]`` 改成那时的时刻。"""
        slot, seconds = self.turn(receivers, limits, clock)
        if seconds > 0:
            self._sleep(seconds)
        return slot


_AGENT = re.compile('[0-9]{1,18}')
_RECEIVERS = 'touser', 'toparty', 'totag'       #: JSON 里收件人的三个字段。
_UNREACHED = 'invaliduser', 'invalidparty', 'invalidtag', 'unlicenseduser'      #: 回答里没收到的人。


class _Caller:
    """`WeChatClient` 和 `WeChatRobot` 共用的；子类的 ``_authorized`` 带着自己的
    凭据调用。
    """
    connect_within: float = 5
    call_within: float = 15
    media_within: float = 120
    tries: int = 3
    pause: float = 1
    max_answer: int = 2 << 20
    max_download: int = 50 << 20
    per_minute: int = 30
    retry_within: float = 0
    progress: 'Optional[Callable[[int, int], object]]' = None

    settings: 'Dict[str, str]'
    api_base: str

    _clock = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __init__(self, appname, ini_name, needed, settings):
        self.settings = get_config(appname, ini_name, **settings)
        _require(self.settings, *needed)
        self.api_base = _normal_base(self.settings['api_base'] or _API_BASE)
        self._pace = _Pace(lambda seconds: self._sleep(seconds))
        # urllib 的 opener，各个线程共用；第一次用到才建
        self._urllib = functools.lru_cache(maxsize=None)(functools.partial(_make_opener, self.settings['ca_file']))

    def __repr__(self):
        return '<%s of corpid %s>' % (type(self).__name__, _mask(self.settings['corpid']))

    def _send_one(self, path, who, message):
        slot = self._pace.wait(who, {60: self.per_minute}, self._clock)
        try:
            answer = self._authorized(path, {}, message)
        finally:
            slot[0] = max(slot[0], self._clock())
        partial = {key: answer[key] for key in _UNREACHED if answer.get(key)}
        if partial:
            logger.warning('%s reached not everybody：有的收件人不对：%s', path, _show(partial))
        return answer

    def _send_each(self, path, message, limits, prepare):
        """一条一条地发 → 最后一条的回答。``prepare(发过几条, 一条)`` →（给谁，它的 JSON）。"""
        sent, answer = 0, None
        for item in _flat(message):
            for part in _made(item, limits=limits):
                try:
                    answer = self._send_one(path, *prepare(sent, part))
                except APIError as e:
                    e.errmsg += '（前面的 %d 段已经发了）' % sent if sent else ''
                    raise
                sent += 1
        if answer is None:
            raise APIError(44004, '没有要发的', path)
        return answer

    def _upload(self, api, path, kind, name=None):
        file = _File(path, name)
        query = {'type': _media_kind(file, kind)}
        answer = self._authorized(api, query, _Upload(file, self.progress), within=self.media_within)
        if not isinstance(answer.get('media_id'), str):
            raise NetworkError(502, '回答里没有 media_id', 'media/upload')
        return answer


def _code_and_message(method: 'Callable[P, Message]') -> 'Callable[P, Message]':
    """旧接口的约定：返回企业微信的 dict，网络或参数不对时 errcode 是 -1；不抛异常。"""
    @functools.wraps(method)
    def answer(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except (NetworkError, ConfigError, FormatException) as e:
            return {'errcode': -1, 'errmsg': str(e)}
        except APIError as e:
            return {'errcode': e.errcode, 'errmsg': e.errmsg}
        except (OSError, TypeError, ValueError) as e:
            return {'errcode': -1, 'errmsg': '%s: %s' % (type(e).__name__, e)}
    return answer


#: 这些 errcode 以后，不再指望主动发送：凭据、IP、应用。
_CANNOT_SEND = frozenset([40001, 40013, 40056, 40091, 41002, 41004, 48006, 50003, 60020, 301002])
_TOKENS = _Threads(16)          # 去要 token 的线程


class WeChatClient(_Caller):
    """以应用的身份发消息，调用企业微信的任何 API。不需要 pycryptodome。

        client = WeChatClient('demo')
        client.send('磁盘 91%')             # 发给配置里的 touser
        client.send(pathlib.Path('cam.jpg'), to='zhangsan|lisi')
        client.call('user/get', userid='zhangsan')

    ``appname``、``ini_name`` 和设置同 `get_config`，要有 corpid 和 secret，发
    消息还要 agentid；``store`` 放 access_token，默认是 `FileStore`。所有线程
    可以共用一个。被拒绝抛 `APIError`，没有回答抛 `NetworkError`，它是前者的一
    种；缺了配置抛 `ConfigError`。

    时限和上限，在子类里改，或给实例；单位是秒和字节，时限都是总数：

        connect_within = 5      # 连接
        call_within = 15        # 一次 JSON 调用
        media_within = 120      # 一次上传、下载
        tries = 3               # 连不上、企业微信繁忙 (-1) 时一共试几次
        pause = 1               # 第一次以后停多久，以后每次加倍
        retry_within = 0        # 连不上时一直试到这么久，例如断网时的警报；0 是
                                # 只试 tries 次
        per_minute = 30         # 每分钟最多给一个收件人发几条：再多的，企业微信
                                # 不报错就丢掉
        max_answer = 2 << 20    # JSON 回答
        max_download = 50 << 20 # 下载的文件
        progress = None         # 上传时每发一块调用一次 progress(sent, total)，
                                # 字节
        token_margin = 300      # access_token 提前多久换新的
        refused_within = 60     # Secret 被拒绝以后多久不再问：问多了，企业微信
                                # 会封 IP 一小时
        store_within = 1        # 等存储（`MemoryStore` 以外的）；再慢就当它坏
                                # 了，先用内存
    """

    token_margin: float = 300
    refused_within: float = 60
    store_within: float = 1

    trusted: 'Optional[bool]'

    def __init__(self, appname: 'Union[str, Dict[str, str]]' = 'demo', ini_name: 'Optional[str]' = None,
                 store: 'Any' = None, **settings: 'Union[None, str, int]') -> None:
        super().__init__(appname, ini_name, ('corpid', 'secret'), settings)
        inner = getattr(store, 'store', store)          # `_Steady` 里面的
        self._machine = inner if isinstance(inner, FileStore) else FileStore()
        self.store = _steady(self._machine if store is None else store, self)
        identity = self.api_base, self.settings['corpid'], self.settings['secret']
        self._token_name = 'easywechat:token:' + hashlib.sha256('\0'.join(identity).encode('utf-8')).hexdigest()
        self._refused = 0, None
        #: 最近一次调用以后，能不能发消息：None 还不知道，False 是因为凭据或 IP 被拒绝。
        self.trusted = None
        # _flights：正在要的 token，{已经不能用的那个：`_Promise`}
        _fresh(self, _lock=threading.Lock, _flights=dict)

    def _cached_token(self, stale):
        value = self.store.get(self._token_name)
        token = value.decode('ascii', 'replace') if isinstance(value, bytes) else value
        return token if token and token != stale else None

    def _new_token(self):
        """向企业微信要 (path/91039)，存下。"""
        until, refusal = self._refused
        if self._clock() < until:
            raise APIError(*refusal)
        query = {'corpid': self.settings['corpid'], 'corpsecret': self.settings['secret']}
        try:
            answer = _Call(self, 'gettoken', query).run()
        except APIError as e:
            if not isinstance(e, NetworkError) and e.errcode != -1:
                self._refused = self._clock() + self.refused_within, (e.errcode, e.errmsg, e.path)
                self.trusted = False
            raise
        token, seconds = answer.get('access_token'), answer.get('expires_in')
        if not isinstance(token, str) or not re.fullmatch('[!-~]{1,512}', token):
            raise NetworkError(502, '回答里没有 access_token', 'gettoken',
                               '回答里没有 access_token：看 api_base 写对没有')
        seconds = min(seconds, 7200) if type(seconds) is int and seconds > 0 else 7200
        self.store.set(self._token_name, token.encode('ascii'), ex=max(seconds - self.token_margin, seconds // 2, 1))
        return token

    def _fetch_token(self, stale):
        """一台机器上同时只有一个去要；轮到的时候也许已经有了。"""
        with self._machine.lock(self._token_name, max(self.call_within, self.retry_within), kind='token'):
            return self._cached_token(stale) or self._new_token()

    def _token(self, stale, within):
        """`get_token`，最多等 ``within`` 秒；这个进程里同时只有一个去要，别人等它的结果，或同一个错误。"""
        _check_fork()
        token = self._cached_token(stale)
        if token is None:
            with self._lock:
                flight = self._flights.get(stale)
                if flight is None or flight.done():
                    flight = _Promise(_TOKENS, functools.partial(self._fetch_token, stale), 0)
                    self._flights = {stale: flight}
            try:
                token = flight.result(max(within, self.retry_within))
            except (socket.timeout, RuntimeError) as e:
                raise NetworkError(503, 'no access_token (%s)' % e, 'gettoken',
                                   '要不到 access_token：看网络通不通、api_base 写对没有') from None
        if token not in _tokens:
            _tokens.append(token)
        return token

    def get_token(self, stale: 'Optional[str]' = None) -> str:
        """access_token (str)，从存储里，或向企业微信要（path/91039）；一台机器上
        同时只有一个去要。

        ``stale`` 是已经不能用的那个：存着的还是它，才要新的。最多等
        ``call_within`` 秒。
        """
        return self._token(stale, self.call_within)

    def _authorized(self, path, query, body=None, read=_read_json, within=None):
        """带着 access_token 的一次调用；token 不能用了就换一个，再试恰好一次。``within`` 秒是总数，要 token 也在内。"""
        end, stale = self._clock() + (within or self.call_within), None
        for last in False, True:
            token = self._token(stale, end - self._clock())
            try:
                answer = _Call(self, path, dict(query, access_token=token), body, read, end - self._clock()).run()
                self.trusted = True
                return answer
            except APIError as e:
                if e.errcode in _CANNOT_SEND and (last or e.errcode != 40001):
                    self.trusted = False
                if last or e.errcode not in (40001, 40014, 42001):      # gettoken 的 40001 不到这里
                    raise
            stale = token

    def call(self, path: str, body: 'Optional[Mapping[str, Any]]' = None, **query: object) -> 'Message':
        """企业微信的任何 API → 它的回答 (dict)。

        ``path`` 是 /cgi-bin/ 后面的，例如 'user/get'；``body`` (dict) 给了就是
        POST，否则 GET；其余的参数进查询参数。
        """
        path = re.sub('^/?(cgi-bin/)?', '', path)
        if not re.fullmatch('[A-Za-z0-9_./-]+', path):
            raise ValueError('这不是 API 的路径：%s（例如 user/get）' % _show(path))
        return self._authorized(path, query, body)

    def send(self, message: 'Sendable', to: 'Who' = None, party: 'Who' = None, tag: 'Who' = None,
             **fields: object) -> 'Message':
        """发一条或几条消息，依次；返回企业微信对最后一条的回答 (dict，有 msgid)。

        ``message``：str（超过 2048 字节就分成几条）、`pathlib.Path` 或有名字的
        文件对象（上传，类型看后缀）、官方的 JSON
        ``{'msgtype': …}``(path/90236)、被动回复那样的 dict，或它们的 list、生
        成器。
        ``to``、``party``、``tag``：list 或 ``'a|b'``（逗号、分号、顿号也行）；
        都没有就是消息里写的，再没有是配置里的 touser。
        ``fields`` 是 JSON 最外层别的字段，例如 ``safe=1``。
        部分收件人不对不是错误：回答里有 invaliduser 等，并写日志。
        """
        given = {key: _joined(who) for key, who in zip(_RECEIVERS, (to, party, tag)) if who is not None}
        return self._send_each('message/send', message, _TEXT_LIMITS, functools.partial(self._prepare, given, fields))

    def _prepare(self, given, fields, n, message):
        if message['msgtype'].startswith('update_') and not message.own:
            raise TypeError('%s 只能做被动回复，不能主动发送' % message['msgtype'])
        if message.file():
            message = message.with_body(media_id=self.upload(message.file(), message['msgtype']))
        message = dict(message, **fields)
        if given:
            message = {k: v for k, v in message.items() if k not in _RECEIVERS}
            message.update((key, who) for key, who in given.items() if who)
        elif not any(message.get(key) for key in _RECEIVERS):
            message['touser'] = self.settings['touser']
        who = [key + i for key in _RECEIVERS for i in str(message.get(key) or '').split('|') if i]
        if not who:
            raise APIError(82001, '没有收件人', 'message/send')
        agentid = str(message.get('agentid') or self.settings['agentid'])
        if not _AGENT.fullmatch(agentid):
            _require(self.settings, 'agentid')
            raise ConfigError('agentid 应该是一个数字：「应用管理 → 自建 → 应用」最上面的')
        return who, dict(message, agentid=int(agentid))

    @_code_and_message
    def send_media(self, media_type: str, media_content: 'Union[str, Mapping[str, Any]]', touser: 'Who',
                   toparty: 'Who' = '', totag: 'Who' = '') -> 'Message':
        """旧接口：``media_content`` 是这种消息的 dict，或 str（正文、media_id）。
        返回 dict，不抛异常。
        """
        if isinstance(media_content, str):
            media_content = {'content' if media_type in _TEXT_LIMITS else 'media_id': media_content}
        return self.send({'msgtype': media_type, media_type: media_content}, touser, toparty, totag)

    def upload(self, path: 'File', kind: 'Optional[str]' = None,
               name: 'Optional[str]' = None) -> str:
        """上传临时素材（path/90253）→ media_id (str)，三天有效。边读边发，不占内
        存。

        ``path`` 是路径，或二进制的文件对象、bytes：它们没有名字，就要给
        ``name``，否则 `TypeError`。
        ``kind`` 是 image（10 MB，JPG、PNG）、voice（2 MB，AMR）、video（10
        MB，MP4）、file（20 MB），默认按后缀；
        ``name`` 是显示的文件名。读不了文件抛 `OSError`，大小、类型不对抛
        `APIError`。
        """
        return self._upload('media/upload', path, kind, name)['media_id']

    @_code_and_message
    def upload_media(self, file_type: str, file_path: 'File') -> 'Message':
        """旧接口：上传，返回企业微信的 dict，不抛异常。"""
        return self._upload('media/upload', file_path, file_type)

    def download(self, media_id: str, folder: 'Union[None, str, os.PathLike[str]]' = None) -> 'Path':
        """下载素材 (path/90254) 到 ``folder`` → `pathlib.Path`；至多 50 MiB，不占
        内存。

        ``folder`` 默认是 `state_folder` 里的 downloads，只有自己能进 (0700)。
        文件名由企业微信给，去掉路径和危险的字符，Python 或 shell 会运行的（例
        如 json.py）后面加 ``_``；已经有的不覆盖，加 -1、-2。写不了抛
        `OSError`。
        """
        def write(f):
            answer = self._authorized('media/get', {'media_id': media_id}, None, functools.partial(_save, f, media_id),
                                      self.media_within)
            if 'name' not in answer:
                raise NetworkError(502, '回答不是一个文件', 'media/get')
            return answer['name']
        return _saved(folder, write)


def _mentions(who):
    return ''.join('<@%s>' % i.lstrip('@') for i in who) + '\n' * bool(who)


class WeChatRobot(_Caller):
    """群机器人（path/91770）：一个 key，没有 token，没有可信 IP。

        WeChatRobot('693a91f6-…').send('构建失败', mention='@all')

    ``key`` 是 Webhook 地址里 key= 后面的，或整个地址；不给就是配置里的
    robot。错误、时限和上限同 `WeChatClient`，只有 ``per_minute`` 是 20。
    """

    per_minute: int = 20

    def __init__(self, key: 'Optional[str]' = None, appname: 'Union[str, Dict[str, str]]' = 'demo',
                 ini_name: 'Optional[str]' = None, **settings: 'Union[None, str, int]') -> None:
        if key:
            settings['robot'] = key
        super().__init__(appname, ini_name, ('robot',), settings)
        base, slash, query = self.settings['robot'].rpartition('/cgi-bin/webhook/')
        if slash:                       # 整个地址：私有部署的，就问它自己
            self.api_base = _normal_base(base)
        self._key = re.sub('.*[?&]key=([^&#]*).*', r'\1', query)
        if not re.fullmatch('[0-9A-Za-z_-]{1,128}', self._key):
            raise ConfigError('robot 应该是 Webhook 地址里 key= 后面的，或整个地址：在群机器人的页面上重新复制')
        _remember(self._key)

    def _authorized(self, path, query, body, within=None):
        return _Call(self, path, dict(key=self._key, **query), body, within=within).run()

    def send(self, message: 'Sendable', mention: 'Who' = None) -> 'Message':
        """发一条或几条消息 → 对最后一条的回答 (dict)。每分钟至多 20 条，多的等。

        ``message``：str、官方的 JSON、`pathlib.Path`（2 MB 以内的 JPG、PNG 是
        图片，AMR 是语音，别的是文件），或它们的 list。``mention`` 用于文本和
        markdown（不是 markdown_v2）：userid 或 ``'@all'``，文本也可以是手机
        号，list 或 ``'a|b'``；只在第一条里提醒。
        """
        who = [i for i in _joined(mention).split('|') if i]
        limits = dict(_ROBOT_LIMITS, markdown=4096 - len(_mentions(who).encode('utf-8')))
        return self._send_each('webhook/send', message, limits, functools.partial(self._prepare, who))

    def _prepare(self, who, n, message):
        kind, who = message['msgtype'], who if n == 0 else []
        if who and kind not in ('text', 'markdown'):
            raise TypeError('mention 只用于 text 和 markdown，不能用于 ' + kind)
        if who and kind == 'markdown':
            message = message.with_body(content=_mentions(who) + message.body()['content'])
        elif who:
            phones = [i for i in who if re.fullmatch('[0-9]{11}', i)]
            message = message.with_body(mentioned_mobile_list=phones,
                                        mentioned_list=[i for i in who if i not in phones])
        return ['robot'], self._file(message.file()) if message.file() else dict(message)

    def _file(self, path):
        file = _File(path)
        kind = _media_kind(file)
        if kind == 'image' and file.size <= 2 << 20:
            with file.open() as f:
                data = f.read()
            base64 = binascii.b2a_base64(data, newline=False).decode()
            return {'msgtype': 'image', 'image': {'base64': base64, 'md5': hashlib.md5(data).hexdigest()}}
        kind = kind if kind == 'voice' else 'file'
        return {'msgtype': kind, kind: {'media_id': self.upload(path, kind)}}

    def upload(self, path: 'File', kind: str = 'file', name: 'Optional[str]' = None) -> str:
        """上传文件或语音（kind 是 file、voice）→ media_id (str)，三天有效，只有这
        个机器人能用。
        """
        return self._upload('webhook/upload_media', path, kind, name)['media_id']


# ---- 回调 Callbacks ---------------------------------------------------------------------------
# 注册过的函数，和一条消息该归哪一个。

#: wecom 文档里的消息类型和事件，用来提醒写错的名字；新的类型照样可以注册。
_TYPES = frozenset('text image voice video shortvideo location link file mixed event *'.split())
_EVENTS = frozenset(
    'subscribe unsubscribe enter_agent LOCATION batch_job_result change_contact click view view_miniprogram '
    'scancode_push scancode_waitmsg pic_sysphoto pic_photo_or_album pic_weixin location_select '
    'template_card_event template_card_menu_event taskcard_click open_approval_change sys_approval_change '
    'share_agent_change share_chain_change inactive_alert low_active_alert close_inactive_agent '
    'reopen_inactive_agent low_active active_restored upload_media_job_finish kf_msg_or_event '
    'kf_account_auth_change change_external_contact change_external_chat change_external_tag change_chain '
    'security living_status_change msgaudit_notify unlicensed_notify delete_calendar modify_calendar '
    'modify_schedule delete_schedule respond_schedule doc_change smart_sheet_change meeting_change '
    'meeting_statistics app_email_change public_email_change customer_acquisition '
    'enter_chat feedback_event disconnected_event'.split())
_TYPE_FORM = re.compile(r'\*|[A-Za-z][A-Za-z0-9_]*|event:[A-Za-z][A-Za-z0-9_]*')


_MISSING = object()             # 没有给：None 是写错了，例如忘了 return 的函数的结果


def _name_of(func):
    return getattr(func, '__qualname__', repr(func))


class Callbacks:
    """注册的函数；最具体的优先。"""
    def __init__(self) -> None:
        self._functions: 'Dict[str, Callable[..., Result]]' = {}
        self._patterns: 'List[Tuple[re.Pattern[str], Callable[..., Result]]]' = []

    def add(self, msg_type: str, func: 'Any', pattern: 'Union[None, str, re.Pattern[str]]') -> 'Any':
        """注册 ``func``，返回它；没有给 (`_MISSING`)，返回装饰器。写错了的抛 `TypeError`、`ValueError`。"""
        if not isinstance(msg_type, str) or not _TYPE_FORM.fullmatch(msg_type):
            raise ValueError("没有 %r 这种消息类型，要写成 @server.register_callback('text')" % (msg_type,))
        pattern = None if pattern is None else re.compile(pattern)
        if pattern and not isinstance(pattern.pattern, str):
            raise TypeError('pattern 应该是 str，用户的文字也是')
        if func is _MISSING:
            return functools.partial(self.add, msg_type, pattern=pattern)
        if not callable(func):
            raise TypeError('回调必须是可调用对象，得到的是 %s：是不是要写它的一个方法？'
                            % type(func).__name__)
        if getattr(getattr(func, '__code__', None), 'co_flags', 0) & 0x280:     # async def
            _LOOP.start()
        known = _EVENTS if msg_type.startswith('event:') else _TYPES
        name = msg_type.partition(':')[2] or msg_type
        if name not in known:
            import difflib
            close = difflib.get_close_matches(name, known)
            logger.warning('unknown type %s：这个版本没有听说过这种消息%s', msg_type,
                           '，是不是 %s？' % '、'.join(close) if close else '，照样注册')
        if pattern is None:
            before = self._functions.get(msg_type, func)
            if before != func:
                logger.warning('%s had a callback already：原来是 %s，现在是 %s', msg_type, _name_of(before),
                               _name_of(func))
            self._functions[msg_type] = func
        elif msg_type == 'text':
            self._patterns.append((pattern, func))
        else:
            raise ValueError('pattern 只用于 text，不能用于 %s' % msg_type)
        return func

    def knows(self, msg_type: str) -> bool:
        """注册过 ``msg_type``，一字不差。"""
        return msg_type in self._functions

    def find(self, msg: 'Message') -> 'Tuple[Optional[Callable[..., Result]], Tuple[str, ...]]':
        """→（函数，附加的参数）；没有注册是 (None, ())。"""
        kind = str(msg.get('MsgType', ''))
        if kind in ('voice', 'mixed') and 'Content' in msg and kind not in self._functions:
            kind = 'text'               # 智能机器人的：说的话、图文里的字
        if kind == 'text' and self._patterns:
            text = str(msg.get('Content', '')).strip().strip(_BLANKS)     # 输入法在后面加空格，平板在前面
            for pattern, func in self._patterns:
                match = pattern.fullmatch(text)
                if match:
                    return func, match.groups()
        event = ['event:%s' % msg.get('Event', '')] if kind == 'event' else []
        for name in event + [kind, '*']:
            if name in self._functions:
                return self._functions[name], ()
        about = (msg.get(key, '') for key in ('MsgType', 'MsgId', 'FromUserName'))
        logger.debug('no callback for %s %s from %s', *map(_Shown, about))
        return None, ()


# ---- 一次 Once --------------------------------------------------------------------------------
# 一条消息只跑一次回调。企业微信等 5 秒，断开，再投递同一条，一共三次：先认领（存储里的一条记录）再跑；后来的投递
# 等同一次运行 (_Run)，或得到存下的答复。一次投递是 ``answer(答复)``，恰好调用一次，从不阻塞；回调给的东西怎样送，是它那
# 条路的 ``replies`` (`_Results`) 的事：expect(run) 认领到了，make(run) 跑回调，late(run, up, last) 慢了，look() 时间
# 到了，left() 没送完的；slow 秒以后算慢，keeps 的还没有轮到跑也算；hold_within 秒还没有轮到跑、没有答，就作废，等
# 企业微信再投递。
# 看时间的线程只在有消息没完的时候才有；它从不等谁：写存储、跑回调，都交给别的线程。

#: 一次运行走到了哪一步：认领、排队，或等别的进程；回调在跑；回调完了，还有要送的；完了。
_WAITING, _RUNNING, _PUSHING, _ENDED = range(4)
_THREE = 29 / 9  #: 企业微信一共投递三次：第三次该答的时候，离第一次是一次的多少倍 (14.5 s / 4.5 s)。


class _Run:
    """一条消息的一次运行，和在等它的各次投递。"""
    __slots__ = ('key', 'message', 'sender', 'replies', 'begin', 'newest', 'stage', 'reply', 'count', 'given',
                 'parcel', 'leased', 'due', 'record', 'deliveries', '_lock')

    def __init__(self, key, message, answer, replies):
        self.key, self.message, self.sender = key, message, str(message.get('FromUserName', ''))
        self.replies = replies          # 它的东西走哪条路
        self.begin = self.newest = time.monotonic()     # 第一次、最近一次投递
        self.stage, self.reply = _WAITING, None     # 答复：bytes，b'' 是没有；None 是还没有定
        self.count, self.given, self.parcel = 1, 0, None    # 来过几次投递；给出了几条；replies 放它的东西的地方
        self.leased = self.due = None   # 认领到了：上次续的时刻；没有轮到跑：什么时候再看
        self.record = threading.Lock()  # 写它在存储里的记录时拿着：存储可能很慢
        self.deliveries = [(self.begin, answer)]    # 在等的，先来的在前
        self._lock = threading.Lock()   # 改它和 reply 时拿着

    def join(self, answer, most):
        """又一次投递。→ False：这次运行没有答复就完了，重新来。在等的多于 ``most`` 个，最早的就不等了。"""
        first = None
        with self._lock:
            if self.reply is None and self.stage == _ENDED:
                return False
            if self.reply is None:
                self.count, self.newest = self.count + 1, time.monotonic()
                self.deliveries.append((self.newest, answer))
                first = self.deliveries.pop(0)[1] if len(self.deliveries) > most else None
        if self.reply is not None or first:
            (first or answer)(self.reply)
        return True

    def conclude(self, reply, anyway=True):
        """定下答复，给在等的每一次投递；已经定了就不变。→ 给了几次；没有人在等又不是 ``anyway``，就不定，是 0。"""
        with self._lock:
            if self.reply is not None or not (self.deliveries or anyway):
                return 0
            self.reply = reply
            answered, self.deliveries = self.deliveries, []
        for _, answer in answered:
            answer(reply)
        return len(answered)

    def expire(self, before, end=False):
        """``before`` 以前来的投递不等了：没有答案。``end``：再没有投递在等，这次运行就作废。"""
        with self._lock:
            gone = [answer for begin, answer in self.deliveries if begin <= before]
            del self.deliveries[:len(gone)]
            if end and not self.deliveries:
                self.stage = _ENDED
        for answer in gone:
            answer(None)


class Once:
    """每条消息一次运行。``limits`` 有 store 和各种时限：它是 `Dispatcher`。"""
    deliveries = 3  #: 同一条消息最多几次投递一起等。

    _runs: 'Dict[str, _Run]'
    _wake: 'threading.Event'

    def __init__(self, roads: 'List[Any]', limits: 'Any') -> None:
        self._roads, self._limits = roads, limits
        # 在另一条线程上跑回调；同时跑几个由 _busy 管
        self.spawn = functools.partial(_Threads(float('inf')).submit, 0)
        self._errands = _Threads(32)                    # 写存储
        self.errand = functools.partial(self._errands.submit, 0)
        # _runs：存储里的名字 → _Run，先来的在前；_busy：谁的几个回调在跑；_watching：有一条线程在看时间，_wake 叫醒它
        _fresh(self, _lock=threading.Lock, _runs=dict, _busy=collections.Counter, _watching=bool, _wake=threading.Event)

    def deliver(self, key: str, message: 'Message', answer: 'Callable[[Optional[bytes]], object]',
                spawn: 'Spawn', replies: 'Any') -> None:
        """一次投递。``answer(bytes)`` 是答复，b'' 是没有；``answer(None)`` 是现在没有答案。

        ``spawn(job, *args)`` 去跑回调，跑不了返回 False；None 是在这里跑。
        """
        mine = _Run(key, message, answer, replies)
        while True:
            run = self._runs.setdefault(key, mine)
            if run is mine:
                break
            if run.join(answer, self.deliveries):
                return
            self._forget(run)
        if not self._watching:
            self._watch()
        self._claim(mine, spawn)

    def _claim(self, run, spawn):
        """认领到了就跑；别的进程认领了，等它的答复；它死了就接手。"""
        store, limits = self._limits.store, self._limits
        try:
            if store.claim(run.key, limits.lease):
                run.leased = time.monotonic()
                run.replies.expect(run)
                return self._enter(run, spawn)
            stored = store.get(run.key)
        except BaseException as e:      # 本文件的错：不能留下一个谁也等不到的
            self._give_up(run)
            if not isinstance(e, Exception):
                raise
            return logger.error('internal error：投递的时候，这个文件自己的错%s', _traceback())
        if stored is not None and stored != b'-':       # 跑过了；b'' 是答复太多，存储丢掉了它的
            run.conclude(stored[1:])
            self._forget(run)
        else:
            run.due = time.monotonic() + limits.lease / 60
            self.look()

    def _turn(self, sender):
        """轮得到这个人再跑一个吗：一共不能太多，一个人的最多四分之一，不然他的慢消息就耽误了所有的人。"""
        most = self._limits.max_callbacks
        return sum(self._busy.values()) < most and self._busy[sender] < max(1, most // 4)

    def _enter(self, run, spawn):
        """轮到它就跑；同时跑着的太多，或开不出线程，就等。"""
        run.due = None
        with self._lock:
            turn = self._turn(run.sender)
            self._busy[run.sender] += turn
        if turn and not spawn:
            self._work(run)
        elif not turn or not spawn(self._work, run):
            self._leave(run, turn)
            run.due = run.begin         # 有空就轮到它

    def _leave(self, run, turn=True):
        """跑完了。→ 也许有排队的轮得到了。"""
        with self._lock:
            full = not self._turn(run.sender)
            self._busy[run.sender] -= turn
            if not self._busy[run.sender]:
                del self._busy[run.sender]
            return full

    def _work(self, run):
        run.stage = _RUNNING
        try:
            run.replies.make(run)
            if run.reply is not None:
                self._finish(run)
        except BaseException:           # make 自己不抛；到这里是本文件的错，仍要回答等着的
            logger.error('internal error：回调以后，这个文件自己的错%s', _traceback())
            run.conclude(b'')
            self._forget(run)
        finally:
            if self._leave(run):
                self.look()

    def _write(self, run, wait=True):
        """它在存储里的记录：没有跑完的是认领，跑完的是答复，没能跑的不留。"""
        if run.record.acquire(wait):    # 上一次还没写完，续就不必了
            try:
                if run.reply is not None and run.stage > _WAITING:
                    # 消息的 CreateTime 可以比现在晚 max_skew
                    self._limits.store.set(run.key, b'+' + run.reply, ex=self._limits.kept + self._limits.max_skew + 1)
                    run.leased = None
                elif run.stage == _ENDED:
                    self._limits.store.delete(run.key)
                else:
                    self._limits.store.hold(run.key, self._limits.lease)
            finally:
                run.record.release()

    def _forget(self, run):
        with self._lock:
            if self._runs.get(run.key) is run:
                del self._runs[run.key]

    def _finish(self, run):
        try:
            self._write(run)
        finally:
            self._forget(run)

    def _give_up(self, run):
        """没能跑：没有答案，不留记录，企业微信会再投递。"""
        run.expire(float('inf'), True)
        self._finish(run) if run.leased else self._forget(run)

    def look(self) -> None:
        """有了变化：看时间的线程现在就看。"""
        self._wake.set()

    def _watch(self):
        with self._lock:
            if self._watching:
                return
            self._watching = True
        try:
            _SEATS.run(int, self._clock, ())
        except RuntimeError as e:       # can't start new thread：企业微信自己会断开
            self._watching = False
            logger.error('no thread starts：开不出看时间的线程，慢的回调不会及时答复：%s', e)

    def _clock(self):
        while True:
            with self._lock:            # 先说没有人在看，再看有没有：刚来的总有一边看得见
                self._watching = False
                runs = list(self._runs.values())
                if not runs and not any(road.left() for road in self._roads):
                    return
                self._watching = True
            limits, now = self._limits, time.monotonic()
            wake = now + 0.1
            try:
                # 刚来的，最早也要过这么久才有事：所以睡这么久，谁的时候都不会错过
                wake = now + min(limits.lease, limits.answer_within, limits.hold_within) / 3
                wake = min([wake] + [t for run in runs for t in self._look_at(run, now) if t > now])
                for road in self._roads:
                    road.look()
            except Exception:           # 本文件的错；别的消息还要有人看着
                logger.error('internal error：看时间的线程里，这个文件自己的错%s', _traceback())
            self._wake.wait(max(0.001, wake - time.monotonic()))
            self._wake.clear()

    def _look_at(self, run, now):
        """一次运行，时候到了的做一做；→ 以后的几个时候。"""
        limits = self._limits
        if run.due:
            self._look_at_waiting(run, now)
        else:
            run.expire(now - run.replies.hold_within)
        begin = next((begin for begin, _ in run.deliveries[:1]), None)
        slow, third = run.begin + run.replies.slow, run.begin + limits.answer_within * _THREE
        up = (begin or now) + limits.answer_within
        waits = run.stage == _WAITING and not (run.leased and run.replies.keeps)
        if run.reply is None and not waits and run.stage < _ENDED and now >= slow:
            last = now >= third or run.count >= self.deliveries and now >= run.newest + limits.answer_within
            run.replies.late(run, begin is not None and now >= up, last)
        if run.reply is not None and run.stage >= _PUSHING:
            self._errands.submit(0, self._finish, run)
        elif run.leased and (run.reply is not None and run.stage > _WAITING
                             or now >= run.leased + limits.lease / 3):
            run.leased = now
            self._errands.submit(0, self._write, run, False)
        return ((run.leased or now) + limits.lease / 3, run.due or 0, slow, up, third,
                (begin or now) + run.replies.hold_within)

    def _look_at_waiting(self, run, now):
        """还没有轮到跑的：没有投递在等它了，就作废；轮到了就跑；别的进程认领了的，到时候再去认领。"""
        before = now - run.replies.hold_within
        if run.reply is not None:           # 答过了，还要跑
            return self._enter(run, self.spawn)
        if run.newest <= before and run.leased:
            logger.error('no callback is free：%s 的消息轮不到，在跑 %d 个回调，他的有 %d 个，或开不出线程；'
                         '企业微信会再投递；慢的回调多，就调大 max_callbacks',
                         _show(run.sender), sum(self._busy.values()), self._busy[run.sender])
        run.expire(before, True)
        if run.stage == _ENDED:
            if self._errands.submit(0, self._give_up, run):
                run.due = None
        elif run.leased:
            self._enter(run, self.spawn)
        elif run.due <= now:
            run.due = None
            if not self._errands.submit(0, self._claim, run, self.spawn):
                run.due = now + self._limits.lease / 60


# ---- 答复 Replies -----------------------------------------------------------------------------
# 回调给的东西怎样到用户那里：只有一条，就是被动回复；不止一条，或太晚了，就主动发送，先发再答：发不出去，第一条还能做
# 被动回复。不能主动发送的应用，几条文本合成一条被动回复。能不能主动发送在后台问，谁也不等；到时候还不知道，就当作不能。

class _Parcel:
    """一次运行给出的东西，和给谁。"""
    __slots__ = 'run', 'kind', 'user', 'corp', 'id', 'code', 'agent', 'xml', 'held', 'items', 'way'

    def __init__(self, run):
        self.run, msg = run, run.message        # 回调可以改它的 dict，所以先记下
        self.user = run.sender
        self.kind, self.corp, self.id, self.code, self.agent = [
            str(msg.get(k, '')) for k in ('MsgType', 'ToUserName', 'MsgId', 'ResponseCode', 'AgentID')]
        self.xml = not isinstance(msg, _JsonMessage)    # JSON 的消息没有被动回复
        self.held = []                  # 还没有定怎样送的
        self.items = []                 # 等着主动发送的；第一条可能正在发
        self.way = None                 # 怎样送，定了：'push' 主动发送，'reply' 被动回复，再有的主动发送

    def push(self, messages):
        """主动发送；`Stream` 的几段，还没有发的接成一条。"""
        for message in messages:
            last = self.items[-1] if len(self.items) > 1 else None
            texts = [m.body()['content'] for m in (last, message) if m and m['msgtype'] == 'text']
            text = _Paragraph('\n\n'.join(texts))
            if len(texts) == 2 and all(isinstance(t, _Paragraph) for t in texts) and len(text.encode('utf-8')) <= 2048:
                self.items[-1] = message.with_body(content=text)
            else:
                self.items.append(message)

    def alone(self):
        """只有一条，做得了被动回复，还没有定怎样送。"""
        held = self.held
        return len(held) == 1 and not self.way and self.xml and held[0]['msgtype'] in _REPLIES and not held[0].own

    def passive(self, message, now):
        """→ 被动回复的 XML (bytes)；没有这样的是 None。"""
        return _passive(message, self.user, self.corp, now) if self.xml else None


class _Outbox:
    """主动发送的队列：给一个用户的，按他的消息来的先后；各个用户互不等待。"""
    patience = 60  #: 先来的消息没有结果，后来的最多等它多少秒：有的回调再也不返回。

    def __init__(self, send):
        self._send = send               # ``send(parcel, 一条)``
        self._threads = _Threads(64)
        # 改 parcel 和另外两个时拿着 lock；_queues：用户 → 他还没完的 _Parcel，先来的在前；_busy：有线程在替他发的用户
        _fresh(self, lock=threading.Lock, _queues=dict, _busy=set)

    def join(self, parcel):
        with self.lock:
            self._queues.setdefault(parcel.user, []).append(parcel)

    def _turn(self, user):
        """轮到的 `_Parcel`，它有要发的；没有是 None。完了的从队里去掉。"""
        queue = self._queues.get(user, ())
        for parcel in list(queue):
            if parcel.items:
                return parcel
            if parcel.run.stage >= _PUSHING and not parcel.held:
                parcel.run.stage, parcel.run.parcel = _ENDED, None
                queue.remove(parcel)
            elif time.monotonic() - parcel.run.begin < self.patience:
                return None
        if not queue:
            self._queues.pop(user, None)
        return None

    def kick(self, user):
        """有轮到的就发；同时只有一条线程替一个用户发。没有线程了，就等下一次 `look`。"""
        with self.lock:
            if user in self._busy or not self._turn(user):
                return
            self._busy.add(user)
        if not self._threads.submit(0, self._drain, user):
            self._busy.discard(user)

    def look(self):
        """时间到了：等够了的、没有线程的，再看一遍。"""
        for user in list(self._queues):
            self.kick(user)

    def _drain(self, user):
        while True:
            with self.lock:
                parcel = self._turn(user)
                if not parcel:
                    return self._busy.discard(user)
                message = parcel.items[0]       # 发完了才去掉：停下的时候说得出还有什么没发完
            self._send(parcel, message)
            del parcel.items[0]

    def left(self):
        with self.lock:
            return [parcel for queue in self._queues.values() for parcel in queue
                    if parcel.run.stage < _PUSHING or parcel.held or parcel.items]


class _Results:
    """一条路的 replies：跑回调，它给的一条一条收下；怎样送是子类的事。``owner`` 是 `Dispatcher`。"""
    keeps = False
    _under_way: 'Set[Any]'

    def __init__(self, owner):
        self._owner = owner
        _fresh(self, _under_way=set)    # 在跑的 async def

    def make(self, run: _Run) -> None:
        """跑回调，它给的一条一条收下。出错记日志；企业微信得到空的 200，否则它会再投递。"""
        parcel = run.parcel
        func, args = self._owner._callback_for(run.message)
        traced = func and logging and logger.isEnabledFor(logging.DEBUG)
        if traced:
            where = (_name_of(func),) + tuple(map(_Shown, (parcel.kind, parcel.id, parcel.user)))
            logger.debug('callback %s begins on %s %s from %s', *where)
        try:
            self._take(parcel, func, func(run.message, *args) if func else None)
        except BaseException as e:      # 用户的代码，连 sys.exit() 也在内
            self._failed(parcel, func, e)
        if traced:
            logger.debug('callback %s ended on %s %s from %s: %d results', *where, run.given)
        run.stage = _PUSHING
        self._over(parcel)

    def _over(self, parcel):
        """回调完了。"""

    def cancel(self) -> None:
        """``async def`` 的，还在跑的，不等了。"""
        for future in list(self._under_way):
            future.cancel()

    def _failed(self, parcel, func, error):
        logger.error('callback %s failed：回调出错了，%s 消息 %s，来自 %s%s', _name_of(func), _Shown(parcel.kind),
                     _Shown(parcel.id), _Shown(parcel.user), _traceback())
        if self._owner.debug:
            self._add(parcel, _message_of(_redact('%s: %s' % (type(error).__name__, error)), 'text'))

    def _take(self, parcel, func, item):
        """又一条，或几条。写错了的只有它自己送不到。→ False：再多的也送不到了。"""
        try:
            if hasattr(item, '__await__'):
                return self._take(parcel, func, _LOOP.wait(item, self._under_way))
            if hasattr(item, '__aiter__'):
                item = _LOOP.each(item, self._under_way)
            if isinstance(item, Stream):
                parcel.run.given += 1
                return self._stream(parcel, func, item)
            if item is None or _is_several(item):
                return all(self._take(parcel, func, one) for one in item or ())
            for message in self._messages(parcel, item):
                parcel.run.given += 1
                if not self._add(parcel, message):
                    return False
        except Exception as e:          # 回调给的是什么都有可能；别的还要接着送
            self._failed(parcel, func, e)
        return True


class Replies(_Results):
    """`Once` 的 replies，一个应用的。"""
    most = 100  #: 一次运行最多多少条没有送出的；再多，回调就等。

    def __init__(self, owner: 'Any') -> None:
        super().__init__(owner)
        self._errands = _Threads(4)     # 问能不能主动发送
        self._outbox = _Outbox(self._push)
        self.look, self.left = self._outbox.look, self._outbox.left
        self._not_ours = None           # 这个应用不能用我们的 Secret 发
        # _asking：正在问能不能主动发送；_ask_at：这时以前不再问
        _fresh(self, _lock=threading.Lock, _asking=bool, _ask_at=int, _under_way=set)

    @property
    def slow(self) -> float:
        """回调跑了这么多秒，就先问好能不能主动发送。"""
        return self._owner.answer_within / 3

    @property
    def hold_within(self) -> float:
        """`Dispatcher.hold_within`。"""
        return self._owner.hold_within

    def expect(self, run: _Run) -> None:
        """认领到了：它的东西，按消息来的先后送。"""
        run.parcel = _Parcel(run)
        self._outbox.join(run.parcel)

    def _over(self, parcel):
        self._settle(parcel)
        self._outbox.kick(parcel.user)

    def late(self, run: _Run, up: bool, last: bool) -> None:
        """回调慢了：先问好能不能主动发送。``up``：该答在等的投递了；``last``：不会再有投递了。"""
        parcel = run.parcel
        if up and parcel:
            self._settle(parcel, True, last)
        else:
            self._can_send()

    def _can_send(self):
        """True、False；正在问是 None。不知道就在后台问，不行过一会儿再问。"""
        settings = self._owner.settings
        if not settings['secret'] or not settings['agentid']:
            return False
        trusted = self._owner.client.trusted
        if trusted:
            return True
        with self._lock:
            if not self._asking and time.monotonic() >= self._ask_at:
                self._asking = self._errands.submit(0, self._find_out)
            return None if self._asking and trusted is None else False

    def _find_out(self):
        again = 60
        try:
            self._owner.client.call('agent/get', agentid=self._owner.settings['agentid'])
        except WeChatError as e:
            again = 5 if isinstance(e, NetworkError) else 60
            logger.info('cannot send：现在不能主动发送：%s', e)
        finally:
            with self._lock:
                self._asking, self._ask_at = False, time.monotonic() + again
            for parcel in self.left():
                self._settle(parcel)
            self._owner._once.look()

    def _stream(self, parcel, func, stream):
        return self._take(parcel, func, stream.paragraphs(self._under_way))

    def _messages(self, parcel, item):
        for message in _made(item, parcel.kind):
            kind = message['msgtype']
            if kind in _MEDIA and kind in _REPLIES and parcel.xml and not (parcel.held or parcel.way) \
                    and message.file():     # 也许只有它一条：上传了，做被动回复
                message = message.with_body(media_id=self._owner.client.upload(message.file(), kind))
            yield message

    def _add(self, parcel, message):
        """太多没有送出的，就等。→ False：再多的也送不到了。"""
        with self._outbox.lock:
            if (parcel.way or len(parcel.held) >= self.most) and self._can_send() is False:
                return self._lose(parcel, [message])
            parcel.held.append(message)
            if parcel.alone():          # 也许只有它一条
                return True
        self._settle(parcel)
        while len(parcel.held) + len(parcel.items) >= self.most and self._can_send() is not False:
            time.sleep(0.05)
        return True

    def _lose(self, parcel, messages):
        logger.warning('not sent to %s：消息 %s 的 %d 条答复送不到；没有 secret、agentid 和可信IP，只能有一条被动回复',
                       _show(parcel.user), _show(parcel.id), len(messages))
        return False

    def _way(self, parcel, up, last):
        """有的东西怎样送；None 是再等等，或没有什么要送。"""
        held, over = parcel.held, parcel.run.stage >= _PUSHING
        if parcel.way:
            return 'push' if held or parcel.way == 'push' else None
        alone = parcel.alone()
        if over and (not held or alone and parcel.run.deliveries):
            return 'reply'
        if not (over or up) and (alone or not held):
            return None
        can = self._can_send()
        if can:
            return 'push'
        return 'reply' if (over or last and held) and (up or can is False) else None

    def _settle(self, parcel, up=False, last=False):
        """已经有的怎样送，能定就定下来。"""
        with self._outbox.lock:
            way, held = self._way(parcel, up, last), parcel.held
            if way:
                parcel.held, parcel.way = [], parcel.way or way
            if way == 'push':
                parcel.push(held)
        if way == 'reply':
            self._reply(parcel, held)
        elif way:
            if up and parcel.way == 'push':         # 不然先发，再答
                parcel.run.conclude(b'')
            self._outbox.kick(parcel.user)

    def _reply(self, parcel, held):
        """被动回复：几条文本合成一条。放不进去的，说不定还能主动发送。"""
        run, rest, reply = parcel.run, held, None
        if len(held) > 1:
            texts = [m.body()['content'] for m in held if m['msgtype'] == 'text']
            rest = (texts and _official('\n\n'.join(texts))) + [m for m in held if m['msgtype'] != 'text']
        for n, message in enumerate(rest):
            reply = parcel.passive(message, self._owner._now())
            if reply:
                del rest[n]
                break
        if self._owner.debug and rest and not reply and self._can_send() is False:
            why = _message_of('（这条答复要主动发送：配上 secret、agentid 和可信IP）', 'text')
            reply = parcel.passive(why, self._owner._now())
        if not run.conclude(reply or b'') and reply:
            logger.warning('no delivery waited：消息 %s（%s）的答复用了 %.0f 秒，企业微信已经不等了；'
                           '配上 secret、agentid 和可信IP，就能主动发送', _show(parcel.id), _show(parcel.user),
                           time.monotonic() - run.begin)
        if rest and self._can_send() is False:
            self._lose(parcel, rest)
        elif rest:
            with self._outbox.lock:
                parcel.push(rest)
            self._outbox.kick(parcel.user)

    def _send(self, parcel, message):
        """以他问的那个应用的身份发；Secret 只能用配置里的那个，就以它，说一次。"""
        client, kind, ours = self._owner.client, message['msgtype'], self._owner.settings['agentid']
        other = parcel.agent if _AGENT.fullmatch(parcel.agent) and parcel.agent not in (ours, self._not_ours) else None
        for agent in filter(None, (other, ours)):
            try:
                if message.own or kind not in ('update_button', 'update_template_card'):
                    return client.send(message, to=parcel.user, **{} if 'agentid' in message else {'agentid': agent})
                return client.call('message/update_template_card', {
                    'userids': [parcel.user], 'response_code': parcel.code, _REPLIES[kind][1]: message.body(),
                    'agentid': int(agent)})
            except APIError as e:
                if agent != other or e.errcode not in (40056, 48002, 60011, 301002):
                    raise
                self._not_ours = other
                logger.warning('another app：secret 不是应用 %s 的（%s 问的是它），以 %s 的身份回答；'
                               '一个应用写一节，用一个 WeChatServer', other, _show(parcel.user), ours)

    def _push(self, parcel, message):
        """发给那个用户。还在等的投递，发到了得到空的；肯定没有发到，就还来得及做被动回复。"""
        error = reply = None
        try:
            self._send(parcel, message)
        except Exception as e:          # 别人的代码、别人的网络；别的还要接着发
            error = e
            if isinstance(e, APIError) and not getattr(e, 'maybe_sent', False):
                reply = parcel.passive(message, self._owner._now())
        replied = parcel.run.conclude(reply or b'', False) and reply
        self._owner._once.look()
        if error:
            logger.error('not %s to %s：消息 %s 的答复%s：%s', 'pushed' if replied else 'delivered',
                         _show(parcel.user), _show(parcel.id), '不能主动发送，做了被动回复' if replied else '没有送到',
                         _show(error, 400))


# ---- 回调模式 Dispatcher ----------------------------------------------------------------------
# 字节进来，完整的回答 (status, headers, body) 出去；这里没有套接字。分两步：打开一个请求 (open_request)，不碰存储、
# 不跑回调；投递它的消息 (deliver)，回答到时候交出去。
# 打开的顺序：限制 → 切信封 → 格式 → 签名 → 时间 → AES → 填充、长度、receiveid → 里面的 XML 或 JSON。

def _body_length(fields, limit):
    """POST 的正文长度 (int)；``fields`` 是小写名字的头部。规则见 RFC 9112 §6，从严。"""
    length = fields.get('content-length')
    if 'transfer-encoding' in fields or length is None:
        raise WeChatError(400 if length is not None else 411)
    if 'content-encoding' in fields:
        raise WeChatError(400, 'Content-Encoding：不收压缩的正文')
    if not re.fullmatch('[0-9]{1,9}', length):
        raise WeChatError(400, 'malformed Content-Length：格式不对')
    if int(length) > limit:
        raise WeChatError(413, 'body too large：正文有 %s 字节，max_body 是 %d' % (length, limit))
    return int(length)


def _answer(status, kind, body=b'', *more):
    return status, [('Content-Type', 'text/%s; charset=utf-8' % kind), ('Content-Length', str(len(body))),
                    ('X-Content-Type-Options', 'nosniff')] + list(more), body


class Dispatcher:
    """一个应用的回调：注册函数，把 HTTP 请求变成回答。

    参数、时限和上限（从 answer_within 到 store_within）在 `WeChatServer` 的说明里。
    本身是 WSGI 可调用对象 (PEP 3333)；别的框架用 `handle`。
    """

    max_body: int = 1 << 20
    max_skew: int = 300
    answer_within: float = 4.5
    hold_within: float = 6
    lease: float = 3
    max_callbacks: int = 32
    store_within: float = WeChatClient.store_within

    #: ``only_touser`` 时别人得到的一句话，空的就不答；``%s`` 是他的账号，可以没有。
    refusal: str = '这台机器只听它主人的话。要用就请主人把你的账号 %s 写进 touser。'

    settings: 'Dict[str, str]'
    debug: bool
    store: 'Any'
    wxcpt: WXBizMsgCrypt
    _roads: 'List[Any]'

    _now = staticmethod(time.time)

    def __init__(self, appname: str = 'demo', ini_name: 'Optional[str]' = None, store: 'Any' = None,
                 needs: 'Who' = (), only_touser: bool = False, **settings: 'Union[None, str, int]') -> None:
        self.appname = appname
        self.settings = get_config(appname, ini_name, needs, **settings)
        self._only = set(self.settings['touser'].lower().split('|')) if only_touser else {'@all'}
        # receiveid → 加解密
        self._crypts = {receive_id: WXBizMsgCrypt(self.settings['token'], self.settings['encoding_aes_key'], receive_id)
                        for receive_id in self._receive_ids()}
        self._accepted = {receive_id.encode('utf-8'): receive_id for receive_id in self._crypts}
        self.route = (self.settings['route_name'] or 'weixin').strip('/')
        if not re.fullmatch('[A-Za-z0-9_.~/-]+', self.route):
            raise ConfigError('route_name 只能用 A-Z a-z 0-9 _ . ~ - 和 /，例如 weixin')
        #: 加解密，`WXBizMsgCrypt`；只连长连接的没有。
        self.wxcpt = next(iter(self._crypts.values()), None)    # type: ignore[assignment]
        #: 为真时，出错的那一行（traceback 的最后一行）、为什么送不到，作为文本回给用户。
        self.debug = False
        #: 认领过的消息放在哪里。
        self.store = MemoryStore() if store is None else _steady(store, self)
        if any(self._crypts):
            _need_xml()
        # 写错的 api_base 现在就报，不等到第一个慢的回调
        self._client = WeChatClient(self.settings, store=None if store is None else self.store) \
            if self.settings['secret'] else None
        self._callbacks = Callbacks()
        self._replies = Replies(self)
        self._roads = [self._replies]
        self._once = Once(self._roads, self)
        self._refusals, self._freshness, self._keys = _RefusalLog(), _Freshness(), _Keys(self.settings)

    def _receive_ids(self):
        """听哪些 receiveid 的回调；缺了什么抛 `ConfigError`。"""
        _require(self.settings, 'corpid', 'token', 'encoding_aes_key')
        return [self.settings['corpid']]

    def __repr__(self):
        return '<%s %s, corpid %s>' % (type(self).__name__, self.appname, _mask(self.settings['corpid']))

    @property
    def app(self) -> 'Dispatcher':
        """自己：WSGI 可调用对象，例如 ``gunicorn bot:server``。"""
        return self

    @property
    def client(self) -> 'WeChatClient':
        """同一个应用的 `WeChatClient`；没有 secret 抛 `ConfigError`。"""
        return self._client or WeChatClient(self.settings)

    @property
    def kept(self) -> int:
        """跑过的消息记多少秒 (int)；比这还早的 (CreateTime) 不收。所以重放的，不
        是太早，就是记得。
        """
        return max(2 * self.max_skew, 600)

    if TYPE_CHECKING:
        @overload
        def register_callback(self, msg_type: str, *, pattern: 'Union[None, str, re.Pattern[str]]' = None
                              ) -> 'Callable[[Function], Function]': ...

        @overload
        def register_callback(self, msg_type: str, func: 'Function',
                              pattern: 'Union[None, str, re.Pattern[str]]' = None) -> 'Function': ...

    def register_callback(self, msg_type: str, func: 'Any' = _MISSING,
                          pattern: 'Union[None, str, re.Pattern[str]]' = None) -> 'Any':
        """注册回调；不给 ``func`` 就是装饰器。

        ``msg_type``：消息类型 ``'text'``、``'image'``…，``'event'``，某个事件
        ``'event:click'``（事件名与收到的 Event 一字不差），或其余的一切
        ``'*'``；最具体的优先。
        ``pattern`` (str 或编译过的正则，只用于 text) 要匹配整条文本（首尾的空
        白不算），各个组接在消息后面作为参数；先注册的先试，都不匹配才轮到
        ``text`` 的普通回调。

            @server.register_callback('text', pattern=r'温度\\s*(\\w+)')
            def temperature(msg, room):
                return room + ' 21°C'
        """
        return self._callbacks.add(msg_type, func, pattern)

    def _callback_for(self, msg):
        """→（函数，没有是 None；附加的参数）。"""
        user, event = str(msg.get('FromUserName') or '').lower(), msg.get('MsgType') == 'event'
        if '@all' in self._only or (user in self._only if user else event):     # 断开了的事件没有人
            return self._callbacks.find(msg)
        return None if event or not self.refusal else self._refuse, ()

    def _refuse(self, msg):
        user = msg['FromUserName']
        logger.warning('refused %s：不在 touser 里', _show(user))
        return self.refusal.replace('%s', user)

    def finish(self, deadline: float) -> None:
        """等在跑的回调、在发的，至多到 ``deadline``（monotonic 秒）：
        ``async def`` 的最后取消；没有送到的写日志。
        """
        _check_fork()
        deadline = max(deadline, time.monotonic() + 0.2)
        while (self._once._runs or self._left()) and time.monotonic() < deadline:
            if time.monotonic() > deadline - 0.2:
                for road in self._roads:
                    road.cancel()
            time.sleep(0.02)
        for parcel in self._left():
            logger.warning('stopped before the answer：停下了，消息 %s（%s）的答复没有送到',
                           _show(parcel.id), _show(parcel.user))

    def _left(self):
        return [parcel for road in self._roads for parcel in road.left()]

    def _open(self, query, encrypt):
        """验签、看时间、解密 →（明文，receiveid），都是 str。"""
        if not self.wxcpt:
            raise WeChatError(404, 'no Token here: 只连长连接，不收回调')
        self.wxcpt.verify(query.get('msg_signature'), query.get('timestamp'), query.get('nonce'), encrypt)
        self._freshness.check('timestamp', int(query['timestamp']), self._now(), self.max_skew, self.max_skew)
        return self.wxcpt._opened(encrypt, self._accepted)

    def _query_of(self, method, target):
        """路径和方法对了 → 查询参数的参数；没有查询参数的 GET 是 None。"""
        path, _, query = target.partition('?')
        if not (path.rstrip('/') if path[-2:] != '//' else path).endswith('/' + self.route):
            raise WeChatError(404, 'path %s, expected /%s：后台的 URL 与 route_name 不一致' % (_show(path), self.route))
        if method not in ('GET', 'HEAD', 'POST'):
            raise WeChatError(405)
        return _parse_query(query) if query or method == 'POST' else None

    def _echo_back(self, method, query):
        """GET：校验的 echostr，或一句话；→ 正文 (bytes)。"""
        if query is None:
            text = 'EasyWeChat is up：EasyWeChat 在运行，把这个网址填到企业微信的后台。\n'
        else:
            text = _echo_text(self._open(query, _echostr(query.get('echostr')))[0])
        return b'' if method == 'HEAD' else text.encode('utf-8')

    def _reply_to(self, query, client, receive_id, reply):
        """被动回复（bytes；空的是没有，None 是没有答案）→ 加密的、完整的回答。"""
        if reply is None:
            return self.refuse(WeChatError(503), client)
        crypt = self._crypts[receive_id]
        if reply:       # 时间照抄请求的：刚验过，而这里的时钟可能没有校过
            write = crypt.encrypt_message if receive_id else crypt.encrypt_json
            reply = write(reply, query['nonce'], query['timestamp']).encode('utf-8')
        return _answer(200, 'xml' if receive_id else 'plain', reply)

    def refuse(self, error: WeChatError, client: str = '') -> 'HTTPAnswer':
        """一个 `WeChatError` → 记下原因，返回没有正文的回答。"""
        if error.status != 503:
            self._refusals.write(client, error)
        return _answer(error.status, 'plain', b'', *[('Allow', 'GET, HEAD, POST')] * (error.status == 405))

    def _read(self, text, receive_id):
        """解密了的 → 消息。"""
        return _read_message(text, receive_id)

    def open_request(self, method: str, target: str, body: bytes = b'', client: str = '') -> 'Tuple[Any, Any]':
        """打开一个请求 → ``(消息, 回答)``，不抛异常；不碰存储，不跑回调。参数同
        `handle`。

        消息是 None：``回答`` 是完整的 ``(status, headers, body)``。否则它是一
        个 dict，交给 `deliver`，``回答(答复)`` 是完整的。
        """
        try:
            query = self._query_of(method, target)
            if method != 'POST':
                return None, _answer(200, 'plain', self._echo_back(method, query))
            if len(body) > self.max_body:
                raise WeChatError(413)
            text, receive_id = self._open(query, _cut_encrypt(body))
            msg = self._read(text, receive_id)
            created = _created(msg)
            if created is not None:     # timestamp 和 nonce 可以对调，签名还是对的：消息自己的时刻不会变
                self._freshness.check('CreateTime', created, self._now(), self.kept, self.max_skew)
            return msg, functools.partial(self._reply_to, query, client, receive_id)
        except WeChatError as e:
            return None, self.refuse(e, client)
        except Exception:               # 最后一道：不许有请求让服务器停下
            logger.error('internal error：这个文件自己的错%s', _traceback())
            return None, self.refuse(WeChatError(500), client)

    def deliver(self, msg: 'Message', answer: 'Callable[[Optional[bytes]], HTTPAnswer]',
                send: 'Callable[..., object]', spawn: 'Spawn' = None) -> None:
        """投递 `open_request` 打开的消息；恰好一次
        ``send(status, headers, body)``，它不许阻塞，不许抛异常。

        回调就在这条线程上跑，跑完才返回（``spawn(job, *args)`` 可以把它交给别
        的线程，交不出去返回 False）：它慢，到时候另一条线程会替它 ``send``。
        """
        self._once.deliver(self._keys.of(msg), msg, lambda reply: send(*answer(reply)), spawn, self._road_of(msg))

    def _road_of(self, msg):
        return self._replies

    def respond(self, method: str, target: str, body: bytes, client: str, send: 'Callable[..., object]',
                spawn: 'Spawn' = None) -> None:
        """一个请求，打开并投递 → 恰好一次 ``send(status, headers, body)``，不抛异
        常。参数同 `handle` 和 `deliver`。
        """
        msg, answer = self.open_request(method, target, body, client)
        if msg is None:
            send(*answer)
        else:
            self.deliver(msg, answer, send, spawn)

    def handle(self, method: str, target: str, body: bytes = b'', client: str = '') -> 'HTTPAnswer':
        """一个请求 → ``(status, headers, body)``，不抛异常。任何线程都可以用。

        ``method`` 和 ``target``（路径和查询参数，没有解码过）是 str，``body``
        是 bytes，``client`` 是对方的地址，只用于日志。``status`` (int) 503 是
        现在没有答案：能断开连接的外壳断开，企业微信就会再投递。回调在另一条留
        着的线程上跑，等它到 ``answer_within`` 或 ``hold_within``。
        """
        _check_fork()
        answers, ready = [], threading.Lock()
        ready.acquire()

        def send(*answer):
            answers.append(answer)
            ready.release()
        self.respond(method, target, body, client, send, self._once.spawn)
        if not ready.acquire(timeout=self.hold_within + 1):     # 开不出看时间的线程
            return self.refuse(WeChatError(503), client)
        return answers[0]

    def __call__(self, environ: 'Dict[str, Any]', start_response: 'Callable[..., object]') -> 'List[bytes]':
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
                    raise WeChatError(400, 'body shorter than its Content-Length：正文没有收完')
            status, headers, body = self.handle(method, target, body, client)
        except WeChatError as e:
            status, headers, body = self.refuse(e, client)
        start_response('%d %s' % (status, http.client.responses[status]), headers)
        return [body]


# ---- 服务器 Server ----------------------------------------------------------------------------
# http.server 的外壳：一个连接一个请求，一个严格的读法，一次 sendall，关闭。它什么也不决定，回答来自 respond。
# 时限都是总数，走一个字节不会重新计时；连接满了，关掉读得最久的那个，正在等回调的从不关。

#: 请求行和头部 (RFC 9112 §3、§5)：大写的方法，以一个 / 开头的可见 ASCII，名字是 token，没有折行。
_HEAD = re.compile(rb'([A-Z]{1,16}) (/(?!/)[!-~]*) HTTP/1\.[01]\r\n'
                   rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)")
#: 半个请求行至少要像的样子；TLS、SSH、杂音在头几个字节就露馅。
_HEAD_START = re.compile(rb'[A-Z]{1,16}(?:\Z| (?:\Z|/(?!/)))')
#: 这些头部要看，每个至多一次；别的不看。
_READ = frozenset(['host', 'content-length', 'transfer-encoding', 'content-encoding', 'expect'])


def _parse_head(head):
    """空行以前的 bytes → ``(方法, 目标, 要看的头部)``；头部是 dict，名字小写。不合规矩抛 `WeChatError`。"""
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
        if name in fields:
            raise WeChatError(400, '%s stands twice：头部里有两个' % name)
        if name in _READ:
            fields[name] = value.strip(' \t')
    return match.group(1).decode(), match.group(2).decode(), fields


class _Handler(http.server.BaseHTTPRequestHandler):
    """一个连接。`BaseHTTPRequestHandler` 逐行读、分几次写；这里都在套接字上做。"""
    def setup(self):
        self.request.setblocking(False)     # 先读、先写，不行再等：多半不必等，省去两次 poll

    def finish(self):
        """基类在这里收拾 rfile 和 wfile；这里没有。"""

    def handle(self):
        """读一个请求。读完以后，套接字就归回答的人：回调慢，是别的线程来答、来关。"""
        server, app, client = self.server, self.server.dispatcher, self.client_address[0]
        try:
            method, target, body = self._read_request(app)
        except WeChatError as e:
            self._send(*app.refuse(e, client), linger=True)
        except OSError as e:            # 走了，或在时限内没有说完：什么也不答
            logger.debug('%s is gone: %s', client, _show(e))
            server.hang_up(self.request)
        else:
            server.done_reading(self.request)
            app.respond(method, target, body, client, self._send)

    def _more(self, deadline, size=1 << 12):
        """再读一些，至多到 ``deadline``（monotonic 秒）；等不到、断了抛 `OSError`。``size`` 大了，碎片就多。"""
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout('out of time')
        try:
            data = self.request.recv(size)
        except BlockingIOError:
            self.request.settimeout(left)
            try:
                data = self.request.recv(size)
            except socket.timeout:
                raise socket.timeout('out of time') from None
            self.request.setblocking(False)
        if not data:
            raise ConnectionError('closed early')
        return data

    def _read_head(self, deadline):
        """读到空行为止 →（空行以前的，多读的），都是 bytes。"""
        server, data = self.server.dispatcher, b''
        while True:
            data += self._more(deadline)
            line, end = data.find(b'\r\n'), data.find(b'\r\n\r\n')
            if not _HEAD_START.match(data):
                hint = '；TLS on a plain port：后台的网址是 https，这里是 http，前面要有反向代理' * (data[0] == 22)
                raise WeChatError(400, _ERRORS[400][1] + hint)
            if line > server.max_line or (line < 0 and len(data) > server.max_line):
                raise WeChatError(414)
            if end > server.max_head or (end < 0 and len(data) > server.max_head):
                raise WeChatError(431)
            if end >= 0:
                return data[:end + 2], data[end + 4:]

    def _read_request(self, app):
        begin = time.monotonic()
        head, rest = self._read_head(begin + app.head_within)
        method, target, fields = _parse_head(head)
        if method != 'POST':
            return method, target, b''
        length = _body_length(fields, app.max_body)
        parts, missing = [rest], length - len(rest)
        if missing > 0 and fields.get('expect', '').lower() == '100-continue':
            self.request.send(b'HTTP/1.1 100 Continue\r\n\r\n')
        while missing > 0:
            self.server.has_read(self.request, len(parts[-1]))
            parts.append(self._more(begin + app.request_within, min(missing + 1, 1 << 16)))
            missing -= len(parts[-1])
        return method, target, b''.join(parts)[:length]

    def _send(self, status, headers, body, linger=False):
        """写出回答，断开；从不等。503：断开，企业微信就会再投递；答了 503 却未必。"""
        head = ['HTTP/1.1 %d %s' % (status, http.client.responses[status])]
        for name, value in headers:
            if not value.isprintable():
                raise ValueError('control character in header %s' % name)
            head.append('%s: %s' % (name, value))
        head.append('Connection: close\r\n\r\n')
        data = b'' if status == 503 else '\r\n'.join(head).encode('latin-1') + body
        try:
            data = data[self.request.send(data):]
        except BlockingIOError:
            pass
        except OSError as e:
            logger.debug('%s is gone: %s', self.client_address[0], _show(e))
            data = b''
        if linger:
            self._linger()
        # 内核一次收不下的，由别的线程接着写
        if not data or not self.server.threads.submit(0, self._write_rest, data):
            self.server.hang_up(self.request)

    def _write_rest(self, data):
        try:
            self.request.settimeout(self.server.dispatcher.write_within)
            self.request.sendall(data)
        except OSError as e:
            logger.debug('%s is gone: %s', self.client_address[0], _show(e))
        finally:
            self.server.hang_up(self.request)

    def _linger(self):
        """拒绝了，对方还在发：读掉一些再关，不然内核发 RST，刚写的回答到不了。这时还算在读，满了会被关掉。"""
        deadline, left = time.monotonic() + 0.3, 1 << 19
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            while left > 0:
                left -= len(self._more(deadline))


def _cannot_listen(error, host, port):
    """→ 同样的 `OSError`，说的是怎么办。"""
    number = getattr(error, 'errno', None) or errno.EINVAL
    what, then = {
        errno.EADDRINUSE: ('已经有程序在用', '停掉它，或换一个端口'),
        errno.EACCES: ('没有权限', '1024 以下的要 root，换一个大的'),
        errno.EADDRNOTAVAIL: ('这台机器没有这个地址', '写 0.0.0.0'),
    }.get(number, (getattr(error, 'strerror', None) or str(error), '端口是 0 到 65535，地址写 0.0.0.0'))
    return OSError(number, '不能监听 %s 的 %s 端口，%s：%s' % (host, port, what, then))


class _HTTPServer(http.server.HTTPServer):
    """`HTTPServer` 加上：不查 DNS、留着的线程、连接的上限。造出来就在服务；开不出线程抛 `RuntimeError`。"""
    request_queue_size = 1024               # 默认的 5 让一千个连接排 24 秒
    allow_reuse_address = os.name == 'posix'
    allow_reuse_port = False

    def __init__(self, dispatcher, host, port):
        self.dispatcher = dispatcher
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self._lock = threading.RLock()
        self.process, self.closed = os.getpid(), False
        self._reading = collections.OrderedDict()       # 还在读的套接字，旧的在前 → 读了多少字节正文
        self._most = dispatcher.max_connections
        with contextlib.suppress(ImportError):          # Windows
            import resource
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if soft >= 0:                   # 描述符少的系统上，连接也要少
                self._most = max(1, min(self._most, soft // 4))
        self.threads = _Threads(self._most + 2 * dispatcher.max_callbacks)
        super().__init__((host, port), _Handler)
        try:
            self._acceptor = _SEATS.start(self._accept)
        except RuntimeError:
            self.server_close()
            raise

    def server_bind(self):
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)        # HTTPServer 的会反查 DNS

    def _accept(self):
        """一条线程接连接，交给别的线程去读、答、关。它不许停。"""
        while not self.closed:
            try:
                request, client_address = self.socket.accept()
                with self._lock:
                    self._reading[request] = 0
                    self._evict(self._most)
                if not self.threads.submit(1, self._serve, request, client_address):
                    self.hang_up(request)
            except (socket.timeout, ConnectionError):       # ConnectionError：对方又走了
                continue
            except Exception as e:          # 也有 MemoryError
                if self.closed:
                    return
                if not isinstance(e, OSError):
                    logger.error('internal error：服务器里，这个文件自己的错%s', _traceback())
                if getattr(e, 'errno', errno.ENOMEM) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._evict(len(self._reading) - 8)
                time.sleep(0.05)            # 马上再来也没有用

    def _serve(self, request, client_address):
        try:
            self.finish_request(request, client_address)
        except Exception:                   # 本文件的错；线程还要接着用
            logger.error('internal error：服务器里，这个文件自己的错%s', _traceback())
            self.hang_up(request)

    def hang_up(self, request):
        """断开。先 shutdown：fork 出来的进程里还有一份，光关掉这一份断不开。"""
        self.done_reading(request)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
        request.close()

    def _evict(self, keep):
        """还在读的最多留 ``keep`` 个，旧的先走。只关读的方向：已经到了的请求照样读完、回答。"""
        with self._lock:
            while len(self._reading) > max(keep, 0):
                oldest, _ = self._reading.popitem(last=False)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RD)

    def has_read(self, request, count):
        """又读了 ``count`` 字节正文；所有连接加起来太多，最旧的就不再读。"""
        with self._lock:
            if request in self._reading:
                self._reading[request] += count
            if sum(self._reading.values()) > self.dispatcher.max_reading:
                self._evict(len(self._reading) - 1)

    def done_reading(self, request):
        with self._lock:
            self._reading.pop(request, None)

    def close(self, deadline):
        """不再接受连接，关掉还在读的，等正在回答的；都完了返回 True。fork 出来的进程里，只关掉自己的那几份描述符。"""
        if self.process != os.getpid():
            for sock in [self.socket] + list(self._reading):
                sock.close()
            return True
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)      # Linux 上叫得醒 accept
        self._acceptor.join(0.1)
        if self._acceptor.is_alive():                   # 别处叫不醒：连一下
            host, port = self.server_address[:2]
            with contextlib.suppress(OSError):
                socket.create_connection(({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port), 1).close()
            self._acceptor.join(2)          # 它停了才关：描述符的号会被别人再用
        self.server_close()
        self._evict(0)
        return self.threads.wait(deadline)


# ---- 信 Mail ----------------------------------------------------------------------------------
# 一封信 (RFC 5322) 变成几条消息：主题、谁写的、正文是一条文本，附件各是一个文件。一行一行读，附件写在磁盘上，不占内存。

_USELESS = {'application/pgp-signature', 'application/pkcs7-signature', 'application/x-pkcs7-signature'}


def _in_charset(data, charset):
    """bytes → str：信里说的字符集；没有说，说错了，就猜。"""
    with contextlib.suppress(LookupError, ValueError):
        return data.decode('gb18030' if re.match('(?i)gb', charset or '') else charset or '')
    with contextlib.suppress(UnicodeError):
        return _text_of(data)
    return data.decode('utf-8', 'replace')


def _words(value):
    """信头里的文字，解码了：``=?GBK?B?…?=``，或者干脆就是汉字。"""
    from email.errors import HeaderParseError
    from email.header import decode_header
    try:
        parts = decode_header(value)
    except HeaderParseError:        # 编码坏了
        parts = [(value, None)]
    return re.sub(r'\s+', ' ', ''.join(part if isinstance(part, str) else _in_charset(part, charset)
                                       for part, charset in parts)).strip()


#: 另起一行的、隔开的标签。
_BLOCKS = dict(dict.fromkeys('br p div tr table li ul ol pre hr h1 h2 h3 h4'.split(), '\n'), td=' ', th=' ')


def _html_text(html):
    """HTML → 文字：一段一行，链接的网址写在后面。"""
    from html.parser import HTMLParser
    out, hidden, links = [], [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag in ('script', 'style', 'title'):
                hidden.append(tag)
            elif tag == 'a':
                links.append((len(out), dict(attributes).get('href') or ''))
            else:
                out.append(_BLOCKS.get(tag, ''))

        def handle_endtag(self, tag):
            if hidden and tag == hidden[-1]:
                hidden.pop()
            elif tag == 'a' and links:
                begin, url = links.pop()
                if re.match('https?://', url) and url not in ''.join(out[begin:]):
                    out.append(' %s ' % url)
            else:
                out.append(_BLOCKS.get(tag, ''))

        def handle_data(self, data):
            if not hidden:
                out.append(re.sub(r'\s+', ' ', data))
    try:
        Reader().feed(html + '<')       # 末尾没有写完的也算
    except (AssertionError, NotImplementedError):       # 写坏了的 <![…]>：有的 Python 抛这些
        out[:] = re.sub('<[^<>]*>', '', html)
    return re.sub(r' *\n[ \n]*', '\n', re.sub(' +', ' ', ''.join(out))).strip()


def _decoder(encoding, f):
    """→ 函数：一行 (bytes) 解码以后写进 ``f``。"""
    left = b''

    def base64(line):
        nonlocal left
        left += line.translate(None, b'\r\n\t ')
        whole = len(left) // 4 * 4
        with contextlib.suppress(ValueError):       # 坏了的一行不要
            f.write(binascii.a2b_base64(left[:whole]))
        left = left[whole:]
    return {'base64': base64, 'quoted-printable': lambda line: f.write(binascii.a2b_qp(line))}.get(encoding, f.write)


_MAIL_HEADER = re.compile(rb'[!-9;-~]+[ \t]*:|[ \t]+\S|From ')       #: 信头的一行，接着上一行的，mbox 的第一行。


def _mail_parts(line_of, folder, marks=()):
    """读信的一个部分，到 ``marks`` 里的一条边界为止 →（头部，写着正文的文件的路径，总头部的是 None）（生成器）。

    ``line_of()`` 是下一行。返回那条边界。
    """
    import email
    import tempfile
    head, line = b'', line_of()
    while _MAIL_HEADER.match(line):
        head += line if len(head) < 1 << 18 else b''
        line = line_of()
    line = line if line.strip() else line_of()      # 不是信头的一行，就是正文了：echo … | sendmail
    headers = email.message_from_string(_in_charset(head, None))
    multipart = headers.get_content_maintype() == 'multipart' and headers.get_boundary() and len(marks) < 16
    mark = ('--%s' % headers.get_boundary()).encode('utf-8')

    def over():
        return not line or line[:2] == b'--' and any(line.rstrip() in (m, m + b'--') for m in marks)
    if multipart:
        yield headers, None
        while not over() and line.rstrip() != mark:     # 边界以前的，没有人看
            line = line_of()
        while line.rstrip() == mark:
            line = yield from _mail_parts(line_of, folder, marks + (mark,))
        while not over():
            line = line_of()
        return line
    fd, path = tempfile.mkstemp(dir=folder)
    with open(fd, 'wb') as f:
        write = _decoder(str(headers.get('Content-Transfer-Encoding', '')).strip().lower(), f)
        while not over():
            write(line)
            line = line_of()
    yield headers, path
    return line


def _mail_text(top, texts, notes):
    """信头、正文 [（类型，文字）] 和附件的毛病 → 一条文本。"""
    plain = [text for kind, text in texts if kind == 'text/plain' and text.strip()]
    sender = _words(top.get('From', '')).replace('"', '')
    lines = [_words(top.get('Subject', ''))[:1000], sender[:200] and '来自 ' + sender[:200]]
    if not re.search('(?im)^(subject|from|to|date|content-type)$', '\n'.join(top.keys())):
        lines = ['%s: %s' % item for item in top.items()]       # 不是信头，是一段文字，第一行碰巧像
    parts = ['\n'.join(filter(None, lines)),
             '\n\n'.join(plain or [_html_text(text) for _, text in texts]).strip(), '\n'.join(notes)]
    # 别人写的字：<a href=…> 是能点的链接
    text = re.sub('(?i)<(?=/?a[ \t\r\n>])', '\uff1c', '\n\n'.join(filter(None, parts)))
    return text or '（一封空的信）'


# ---- 长连接 WebSocket -------------------------------------------------------------------------
# RFC 6455 的客户端。套接字不阻塞，TLS 在内存里 (_TLS)：一条线程收，任何线程发，谁也不拿着锁等。
# 不发 ping（企业微信的网关会答一个有掩码的 pong），收到就答；不提扩展。

_OPCODES = _MORE, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_CLOSE_CODES = frozenset([*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)])


class _Closed(ConnectionError):
    """连接结束了：``args`` 是（关闭码，1006 是没有说就断了；一句话）。"""


class _Violation(Exception):
    """对方没有照 RFC 6455：``args`` 是（该用的关闭码，一句话）。"""


def _masked(data, mask):
    """``data`` (bytes) 与重复的四个字节异或；当作一个大整数，比一个字节一个字节快二十倍。"""
    key = (mask * (len(data) // 4 + 1))[:len(data)]
    return (int.from_bytes(data, 'big') ^ int.from_bytes(key, 'big')).to_bytes(len(data), 'big')


def _ready(sock, write, within, also=()):
    """等套接字能写（能读），或 ``also`` 里的能读，至多 ``within`` 秒 → 等到的那一个；没有是 None。"""
    import select
    if hasattr(select, 'poll'):         # select 只认得 1024 以下的描述符
        poll, socks = select.poll(), {s.fileno(): s for s in (*also, *([sock] if sock else ()))}
        for s in socks.values():
            poll.register(s, select.POLLOUT if write and s is sock else select.POLLIN)
        return next((socks[fd] for fd, _ in poll.poll(max(0, within) * 1000)), None)
    read = list(also) + ([sock] if sock and not write else [])
    return next(itertools.chain(*select.select(read, [sock] if write else [], [], max(0, within))[:2]), None)


class _Elsewhere(Exception):
    """等的时候，别的套接字能读了：``args`` 是它。"""


class _TLS:
    """TLS 在内存里，套接字在外面：一次收到几条记录就解几条。OpenSSL 的一个对象不能两条线程同时用：锁一会儿，从不等。"""
    def __init__(self, context, hostname):
        import ssl
        self._more, self._lock = ssl.SSLWantReadError, threading.Lock()
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._in, self._out, server_hostname=hostname)

    def shake_hands(self, data):
        """收到的 →（握好了没有，要发的）。"""
        self._in.write(data)
        try:
            self._object.do_handshake()
        except self._more:
            return False, self._out.read()
        return True, self._out.read()

    def seal(self, data):
        with self._lock:
            self._object.write(data)
            return self._out.read()

    def open(self, data):
        parts = []
        with self._lock, contextlib.suppress(self._more):
            self._in.write(data)
            while self._in.pending or self._object.pending():
                parts.append(self._object.read(1 << 16))
        return b''.join(parts)


class _WebSocket:
    """一条连上了的长连接。一条线程收，任何线程发；``heard`` 是最近听到一个字节的时刻 (monotonic)。

    连不上、不是 WebSocket 抛 `OSError`；``within`` 秒是总数（DNS 除外），之后写一帧也至多这么久，加上每 8 KiB 一秒。
    """
    most = 4 << 20  #: 一条消息最多多少字节。
    slowest = 8 << 10  #: 上行再慢，一秒也有这么多字节。

    def __init__(self, url, ca_file='', within=10):
        from urllib import request as web
        parts, self._within = urllib.parse.urlsplit(url), within
        secure, deadline = parts.scheme == 'wss', time.monotonic() + within
        where = parts.hostname, parts.port or (443 if secure else 80)
        proxies = web.getproxies()
        proxy = proxies.get('https' if secure else 'http') or proxies.get('all')
        proxy = None if not proxy or web.proxy_bypass(parts.netloc) else urllib.parse.urlsplit(
            proxy if '://' in proxy else 'http://' + proxy)
        _remember(proxy.password or '' if proxy else '')
        if proxy and proxy.scheme != 'http':
            raise OSError('%s 代理不行，要 http:// 的' % proxy.scheme)
        self._sending, self._tls = threading.Lock(), None
        self._buffer = bytearray()
        self._parts, self._size, self._kind = [], 0, None       # 一条消息的片段，一共多少字节，类型
        self._decoder = None                # 文字的，几个片段共用
        self._closing, self.heard = False, time.monotonic()
        self._sock = socket.create_connection((proxy.hostname, proxy.port or 80) if proxy else where, within)
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.setblocking(False)
            if proxy:
                self._tunnel('%s:%d' % where, proxy, deadline)
            if secure:
                self._start_tls(_TLS(_tls(ca_file), parts.hostname), deadline)
            self._shake_hands(parts, deadline)
        except BaseException:
            self._sock.close()
            raise

    def _io(self, operation, write, deadline, also=()):
        """``operation()``，要等就等，至多到 ``deadline``：等不到抛 `socket.timeout`，``also`` 先到抛 `_Elsewhere`。"""
        while True:
            with contextlib.suppress(BlockingIOError):
                return operation()
            try:
                found = _ready(self._sock, write, deadline - time.monotonic(), also)
            except ValueError:              # 别的线程关了它
                raise _Closed(1006, '这边关了') from None
            if found is None:
                raise socket.timeout('no answer in time')
            if found is not self._sock:
                raise _Elsewhere(found)

    def _write(self, data, deadline):
        view = memoryview(self._tls.seal(data) if self._tls else data)
        while view:
            view = view[self._io(functools.partial(self._sock.send, view), True, deadline):]

    def _receive(self, deadline, also=()):
        data = self._io(functools.partial(self._sock.recv, 1 << 16), False, deadline, also)
        if not data:
            raise _Closed(1006, '没有说就断了')
        self.heard = time.monotonic()
        return data

    def _read(self, deadline, also=()):
        """再收一些，放进 ``_buffer``。"""
        data = self._receive(deadline, also)
        self._buffer += self._tls.open(data) if self._tls else data

    def _ask(self, lines, deadline):
        """发一个 HTTP 的头部 →（状态，头部）。"""
        self._write('\r\n'.join(lines + ['', '']).encode('latin-1'), deadline)
        while b'\r\n\r\n' not in self._buffer:
            if len(self._buffer) > 1 << 14:
                raise OSError('回答的不是 HTTP')
            self._read(deadline)
        head, _, self._buffer = self._buffer.partition(b'\r\n\r\n')
        status, _, rest = bytes(head).partition(b'\r\n')
        match = re.fullmatch(rb'HTTP/1\.[01] ([0-9]{3})(?: .*)?', status)
        if not match:
            raise OSError('回答的不是 HTTP')
        return int(match.group(1)), http.client.parse_headers(io.BytesIO(rest + b'\r\n\r\n'))

    def _tunnel(self, where, proxy, deadline):
        lines = ['CONNECT %s HTTP/1.1' % where, 'Host: ' + where]
        if proxy.username:
            user = ':'.join(urllib.parse.unquote(part or '') for part in (proxy.username, proxy.password))
            lines.append('Proxy-Authorization: Basic ' + binascii.b2a_base64(user.encode(), newline=False).decode())
        status = self._ask(lines, deadline)[0]
        if status != 200 or self._buffer:
            raise OSError('Tunnel connection failed: %d' % status)

    def _start_tls(self, tls, deadline):
        done, data = tls.shake_hands(b'')
        while not done:
            self._write(data, deadline)
            done, data = tls.shake_hands(self._receive(deadline))
        self._write(data, deadline)
        self._tls = tls
        self._buffer += tls.open(b'')

    def _shake_hands(self, parts, deadline):
        key = binascii.b2a_base64(os.urandom(16), newline=False)
        path = (parts.path or '/') + ('?' + parts.query if parts.query else '')
        status, headers = self._ask([
            'GET %s HTTP/1.1' % path, 'Host: ' + parts.netloc.rpartition('@')[2], 'Upgrade: websocket',
            'Connection: Upgrade', 'Sec-WebSocket-Key: ' + key.decode(), 'Sec-WebSocket-Version: 13',
            'User-Agent: EasyWeChat'], deadline)
        accept = hashlib.sha1(key + b'258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest()
        if status != 101 or headers.get('Upgrade', '').lower() != 'websocket' or not re.search(
                r'(?i)(^|,)\s*upgrade\s*(,|$)', headers.get('Connection', '')) or headers.get(
                'Sec-WebSocket-Accept', '') != binascii.b2a_base64(accept, newline=False).decode() or headers.get(
                'Sec-WebSocket-Extensions') or headers.get('Sec-WebSocket-Protocol'):
            raise OSError('那里没有 WebSocket，回答的是 %d' % status)

    def _send(self, opcode, data):
        mask, size = os.urandom(4), len(data)
        head = bytes([0x80 | opcode, 0x80 | size]) if size < 126 else struct.pack(
            '>BBH', 0x80 | opcode, 0xfe, size) if size < 1 << 16 else struct.pack('>BBQ', 0x80 | opcode, 0xff, size)
        with self._sending:
            if self._closing:
                raise _Closed(1006, '已经关了')
            self._closing = opcode == _CLOSE
            try:
                self._write(head + mask + _masked(data, mask), time.monotonic() + self._within + size / self.slowest)
            except OSError:                 # 只出去了半帧：这条连接完了
                self.hang_up()
                raise

    def send(self, message):
        """发一条：str 是文字，bytes 是二进制。断了、写不出去抛 `OSError`。"""
        self._send(*(_TEXT, message.encode('utf-8', 'replace')) if isinstance(message, str) else (_BINARY, message))

    def receive(self, within, also=()):
        """→ 一条消息 (str 或 bytes)；``within`` 秒没有是 None；断了抛 `_Closed`，别的 `OSError`。

        ``also`` 里的套接字先能读了，返回它。
        """
        deadline = time.monotonic() + within
        while True:
            try:
                frame = self._frame()
                if frame is None:
                    self._read(deadline, also)
                    continue
                message = self._take(*frame)
            except socket.timeout:
                return None
            except _Elsewhere as e:
                return e.args[0]
            except _Violation as e:
                self.close(*e.args)
                raise _Closed(*e.args) from None
            except OSError:
                self._end()
                raise
            if message is not None:
                return message

    def _frame(self):
        """``_buffer`` 里完整的一帧 →（是不是最后的片段，类型，内容），从里面去掉；还不完整是 None。"""
        data, at = self._buffer, 2
        if len(data) < 2:
            return None
        opcode, masked, size = data[0] & 15, data[1] >> 7, data[1] & 127
        if data[0] & 0x70 or opcode not in _OPCODES or opcode >= _CLOSE and (size > 125 or data[0] < 0x80) or (
                masked and opcode < _CLOSE):
            raise _Violation(1002, '不是一帧')
        if size > 125:
            at, form = (4, '>H') if size == 126 else (10, '>Q')
            if len(data) < at:
                return None
            size, = struct.unpack_from(form, data, 2)
        if opcode < _CLOSE and self._size + size > self.most:
            raise _Violation(1009, '消息超过 %d 字节' % self.most)
        end = at + 4 * masked + size
        if len(data) < end:
            return None
        payload = bytes(data[at + 4 * masked:end])
        if masked:                          # 企业微信的网关给控制帧加掩码
            payload = _masked(payload, bytes(data[at:at + 4]))
        final = data[0] >= 0x80
        del data[:end]
        return final, opcode, payload

    def _take(self, final, opcode, payload):
        """一帧 → 它完成的消息；没有是 None。"""
        if opcode == _PING:
            with contextlib.suppress(_Closed):
                self._send(_PONG, payload)
        elif opcode == _CLOSE:
            self._closed_by(payload)
        elif opcode != _PONG:
            if (opcode == _MORE) != (self._kind is not None):
                raise _Violation(1002, '片段的顺序不对')
            if final and opcode == _TEXT:       # 多半
                return self._text(payload.decode, 'utf-8')
            if opcode != _MORE:
                self._kind, self._decoder = opcode, codecs.getincrementaldecoder('utf-8')()
            self._size += len(payload)
            self._parts.append(self._text(self._decoder.decode, payload, final) if self._kind == _TEXT else payload)
            if final:
                message = (b'' if self._kind == _BINARY else '').join(self._parts)
                self._parts, self._size, self._kind = [], 0, None
                return message
        return None

    @staticmethod
    def _text(decode, *args):
        try:
            return decode(*args)
        except UnicodeDecodeError:
            raise _Violation(1007, '不是 UTF-8') from None

    def _closed_by(self, payload):
        code = struct.unpack_from('>H', payload)[0] if len(payload) > 1 else 1005
        reason = self._text(payload[2:].decode, 'utf-8')
        if len(payload) == 1 or payload and code not in _CLOSE_CODES:
            raise _Violation(1002, '关闭码不对')
        with contextlib.suppress(OSError):
            self._send(_CLOSE, payload[:2])
        raise _Closed(code, reason)

    def close(self, code=1000, reason=''):
        """说再见，断开。收的那条线程调用；别的线程用 `hang_up`。"""
        with contextlib.suppress(OSError):
            self._send(_CLOSE, struct.pack('>H', code) + reason.encode('utf-8')[:100])
        self._end()

    def _end(self):
        """等对方先断，最多一秒 (RFC 6455 §7.1.1)。"""
        deadline = time.monotonic() + 1
        with contextlib.suppress(OSError):
            while True:
                self._buffer.clear()
                self._read(deadline)
        self.hang_up()
        with self._sending:                 # 描述符的号会被别人再用
            self._sock.close()

    def busy(self):
        """有线程正在写：上行慢，一大帧要一会儿。"""
        return self._sending.locked()

    def hang_up(self):
        """马上断开，叫醒在收的那条线程。任何线程都可以用。"""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


# ---- 本机 Door --------------------------------------------------------------------------------
# 本机别的进程要用智能机器人发的，经过本机的一个套接字，交给在运行的那个。双方先证明自己知道 bot_secret，才说别的。它的
# 名字也是一把锁：一个机器人只能有一条长连接，新的一来，旧的就断；谁占着名字，谁连。

def _new_id(name):
    return '%s_%s' % (name, binascii.hexlify(os.urandom(16)).decode())


class _Offline(NetworkError):
    """长连接断着，没有发：连上了再发。"""


def _offline(cmd, failure):
    return _Offline(503, 'the long connection is down', cmd, '长连接断着，没有发%s' % (
        failure and '：%s' % failure.hint or ''))


class _Wire:
    """本机的一条连接：一行一个 JSON，后面可以跟着文件的内容。"""
    def __init__(self, sock):
        self._sock, self._rest = sock, b''
        self.close = sock.close

    def put(self, **fields):
        self._sock.settimeout(5)
        self._sock.sendall(json.dumps(fields).encode('ascii') + b'\n')

    def _more(self, end):
        self._sock.settimeout(max(0.001, end - time.monotonic()))
        data = self._sock.recv(1 << 16)
        if not data:
            raise ConnectionError('closed')
        return data

    def get(self, within):
        """下一行 → dict；``within`` 秒是总数，至多 1 MiB。"""
        end = time.monotonic() + within
        while b'\n' not in self._rest:
            if len(self._rest) > 1 << 20:
                raise ValueError('a line of more than 1 MiB')
            self._rest += self._more(end)
        line, _, self._rest = self._rest.partition(b'\n')
        return json_to_dict(line)

    def put_file(self, f):
        self._sock.settimeout(30)
        for block in iter(functools.partial(f.read, 1 << 16), b''):
            self._sock.sendall(block)

    def get_file(self, f, size, within):
        end = time.monotonic() + within
        while size > 0:
            data, self._rest = self._rest or self._more(end), b''
            f.write(data[:size])
            self._rest, size = data[size:], size - len(data[:size])


def _keyed(bot, *words):
    """知道 bot_secret 的人才算得出的 (str)。"""
    text = '\0'.join((bot.url, bot.settings['bot_id']) + words)
    return hmac.new(bot.settings['bot_secret'].encode('utf-8'), text.encode('utf-8'), hashlib.sha256).hexdigest()


def _proven(said, proof):
    return hmac.compare_digest(str(said.get('proof')).encode('utf-8'), proof.encode())


_ABSTRACT = sys.platform.startswith('linux')        #: 有不在磁盘上的套接字的名字：谁都连得上，进程一死就没有了。


def _port_file(bot):
    return os.path.join(_private(_cache_folders()), 'bot-%s.port' % _keyed(bot, 'name')[:40])


def _dial(bot):
    """连占着名字的 → 套接字；没有人抛 `OSError`、`ValueError`。"""
    if not _ABSTRACT:
        with open(_port_file(bot), encoding='ascii') as f:
            return socket.create_connection(('127.0.0.1', int(f.read(5))), 5)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(5)
        sock.connect('\0easywechat-' + _keyed(bot, 'name'))
        return sock
    except OSError:
        sock.close()
        raise


def _bind(sock, bot):
    if _ABSTRACT:
        return sock.bind('\0easywechat-' + _keyed(bot, 'name'))
    with contextlib.suppress(OSError, ValueError):
        _dial(bot).close()
        return errno.EADDRINUSE
    sock.bind(('127.0.0.1', 0))
    path = _port_file(bot)
    with open(os.open(path + '.tmp', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w', encoding='ascii') as f:
        f.write('%5d' % sock.getsockname()[1])
    return os.replace(path + '.tmp', path)


def _listen(bot):
    """占住这个机器人的名字 → 在听的套接字；别的进程占着是 None。"""
    sock = socket.socket(socket.AF_UNIX if _ABSTRACT else socket.AF_INET)
    try:
        if not _bind(sock, bot):
            sock.listen(8)
            sock.setblocking(False)
            return sock
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise
    sock.close()
    return None


class _Door:
    """占着名字的这一边：替本机别的进程发。"""
    most = 8  #: 同时几个。

    def __init__(self, bot, session):
        self._bot, self._session, self._guests, self._wrong = bot, session, _Threads(self.most), 0

    def open(self, listener):
        """有人来了，交给别的线程；从不等。"""
        try:
            sock = listener.accept()[0]
        except OSError:                     # 又走了；或者只是叫醒
            return
        if not self._guests.submit(0, self._serve, sock):
            with sock, contextlib.suppress(OSError):
                sock.setblocking(False)
                sock.send(b'{"busy": true}\n')

    def _serve(self, sock):
        wire = _Wire(sock)
        with sock, contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            ours = _new_id('')
            wire.put(nonce=ours)
            hello = wire.get(5)
            theirs = str(hello['nonce'])
            if not _proven(hello, _keyed(self._bot, 'guest', ours, theirs)):
                self._wrong += 1
                if self._wrong & (self._wrong - 1) == 0:
                    logger.warning('wrong proof: 本机有程序想用这个机器人发消息，却不知道 bot_secret（%d 次）',
                                   self._wrong)
                return time.sleep(min(0.1 * self._wrong, 2))
            wire.put(proof=_keyed(self._bot, 'host', ours, theirs), pid=os.getpid(), stage=self._session.stage)
            while True:
                asked = wire.get(60)
                try:
                    wire.put(**self._do(wire, asked))
                except OSError as e:
                    wire.put(error=[2, str(e), '', ''], network=False)

    def _do(self, wire, asked):
        """一件事 → 回答。"""
        session, file = self._session, asked.get('upload')
        try:
            with contextlib.ExitStack() as stack:
                if file:                    # 先收完：读到一半说不行，对方还在写
                    import tempfile
                    size, f = int(file['size']), stack.enter_context(tempfile.TemporaryFile())
                    if size > self._bot.max_download:
                        raise ValueError('a file of %d bytes' % size)
                    wire.get_file(f, size, self._bot.media_within)
                if not session.wait(self._bot.offline_within):
                    raise _offline('', session.failure)
                if file:
                    return {'media_id': session.upload(_File(f, str(file['name'])), file['kind'])}
                return {'ack': session.push(dict(asked['send'], chatid=str(asked['send']['chatid'])),
                                            lambda seconds: wire.put(wait=seconds))}
        except APIError as e:
            return {'error': [e.errcode, e.errmsg, e.path, e.hint], 'network': isinstance(e, NetworkError),
                    'maybe_sent': getattr(e, 'maybe_sent', False)}


class _Guest:
    """没有占着名字的这一边：请在运行的机器人替我们发。"""
    def __init__(self, bot, wire, host):
        self._bot, self._wire, self.pid, self.stage = bot, wire, host['pid'], host['stage']
        self.close = wire.close

    def _ask(self, end, file=None, **fields):
        sent = False
        try:
            self._wire.put(**fields)
            if file:
                with file.open() as f:
                    self._wire.put_file(f)
            sent = True
            while True:
                answer = self._wire.get(end)
                if 'wait' not in answer:
                    break
                logger.warning('the running bot waits %.0f s: 太快了', answer['wait'])
                end = answer['wait'] + self._bot.hand_over_within
        except (OSError, ValueError) as e:
            raise NetworkError(504 if sent else 503, '在运行的机器人（%s）没有回答（%s）' % (self.pid, _show(e)),
                               '', '在运行的机器人（进程 %s）没有回答：%s' % (
                                   self.pid, '消息可能已经到了，先看一眼再重发' if sent else '没有发'),
                               sent and not file) from None
        if 'error' in answer:
            errcode, errmsg, path, hint = answer['error']
            if answer['network']:
                error = NetworkError(errcode, errmsg, path, hint)
                error.maybe_sent = answer['maybe_sent']
                raise error
            raise APIError(errcode, errmsg, path, hint)
        return answer

    def push(self, body):
        return self._ask(self._bot.hand_over_within + self._bot.offline_within, send=body)['ack']

    def upload(self, file, kind):
        kind = _media_kind(file, kind)
        about = {'name': _decoded(file.name), 'size': file.size, 'kind': kind}
        return self._ask(self._bot.upload_within, file, upload=about)['media_id']


def _meet(bot):
    """→ 在运行的机器人 (`_Guest`)；没有、不答、证明不了自己知道 bot_secret 的，是 None。"""
    end = time.monotonic() + bot.hand_over_within
    while True:
        sock = None
        try:
            sock = _dial(bot)
            wire = _Wire(sock)
            hello = wire.get(5)
            if hello.get('busy') and time.monotonic() < end:
                sock.close()
                time.sleep(0.2)
                continue
            ours, theirs = _new_id(''), str(hello['nonce'])
            wire.put(nonce=ours, proof=_keyed(bot, 'guest', theirs, ours))
            host = wire.get(5)
            if _proven(host, _keyed(bot, 'host', theirs, ours)):
                return _Guest(bot, wire, host)
        except (OSError, ValueError, KeyError, AttributeError):
            pass
        if sock:
            sock.close()
        return None


# ---- 智能机器人 Bot ---------------------------------------------------------------------------
# path/101463。长连接上一帧是一个 JSON：{"cmd", "headers": {"req_id"}, "body"}，回执没有 cmd，有 errcode。连接有一个主人
# (_Session)：一条线程连、订阅、心跳、收，断了再连；别的线程用 ask 发一帧、等回执。

_BOT_URL = 'wss://openws.work.weixin.qq.com'
_BOT_LIMITS = dict.fromkeys(('text', 'markdown', 'markdown_v2'), 20480)
_CHUNK = 512 << 10  #: 上传时一块最多多少字节。


def _camel_fields(data):
    """事件自己的字段 → 应用的名字；数字成 str。"""
    fields = _camel_case(data) if isinstance(data, dict) else {}
    return {k: str(v) if isinstance(v, (int, float)) else v for k, v in fields.items()}


def _bot_part(part):
    """``{"msgtype": "image", "image": {…}}``：一条消息、一段引用、图文里的一项 → 应用的名字。"""
    kind = str(part.get('msgtype') or '')
    body = part.get(kind) if isinstance(part.get(kind), dict) else {}
    fields, text, url = {'MsgType': kind}, body.get('content'), body.get('url')
    if kind == 'mixed':
        items = body.get('msg_item')
        fields['MsgItems'] = [_bot_part(i) for i in (items if isinstance(items, list) else ()) if isinstance(i, dict)]
        text = '\n'.join(i['Content'] for i in fields['MsgItems'] if 'Content' in i)
    if isinstance(text, str):
        fields['Content'] = text
    if kind == 'voice':                 # 只有转写的文字
        fields['Recognition'] = fields.setdefault('Content', '')
    if isinstance(url, str):
        fields['MediaId'] = '%s#%s' % (url, body.get('aeskey') or '')
        if kind == 'image':
            fields['PicUrl'] = url
    return fields


def _without_mention(text, name):
    """群里的一句话，去掉开头、结尾的 @机器人；不知道它叫什么，就去掉开头的一个 @…。"""
    form = '@' + (re.escape(name.lstrip('@')) if name else r'\S+')
    text = re.sub(r'\A\s*%s(\s+|\Z)' % form, '', text)
    return re.sub(r'\s*%s\s*\Z' % form, '', text) if name else text


def _bot_message(body, name=''):
    """一帧的 body → 回调的 dict：企业微信自己的名字，和应用的 (MsgType、FromUserName、Content …)。"""
    sender, created = body.get('from'), str(body.get('create_time') or '')
    group = body.get('chattype') == 'group'
    msg = _JsonMessage(body)
    msg.bot = True
    msg.update(_bot_part(body), MsgId=str(body.get('msgid') or ''), ToUserName=str(body.get('aibotid') or ''),
               FromUserName=str(sender.get('userid') or '') if isinstance(sender, dict) else '',
               CreateTime=created if _TIMESTAMP.fullmatch(created) else str(int(time.time())),
               ChatId=str(body.get('chatid') or ''), ChatType='group' if group else 'single')
    msg['AgentID'] = msg['ToUserName']
    if isinstance(body.get('quote'), dict):
        msg['Quote'] = _bot_part(body['quote'])
    if group and 'Content' in msg:
        msg['Content'] = _without_mention(msg['Content'], name)
    event = body.get('event')
    if msg['MsgType'] == 'event' and isinstance(event, dict):
        kind = str(event.get('eventtype') or '')
        data = event.get(kind) if isinstance(event.get(kind), dict) else {
            k: v for k, v in event.items() if k != 'eventtype'}
        msg.update({k: v for k, v in _camel_fields(data).items() if k not in msg}, Event=kind)
        msg.setdefault('EventKey', '')
    return msg


def _bot_form(message):
    """`_Message` → 智能机器人能发的：文字 (text)、图片、语音、视频、文件、卡片。别的抛 `TypeError`。"""
    kind, body = message['msgtype'], message.body()
    if kind in ('image', 'voice', 'video', 'file', 'template_card', 'update_template_card', 'text', 'stream'):
        return message
    if kind in ('markdown', 'markdown_v2'):
        return _Message(msgtype='text', text=body)
    articles = body.get('articles') if kind == 'news' else [body] if kind == 'textcard' else None
    _need(articles, '智能机器人不能发 %s' % kind)
    lines = (['**%s**' % a['title'] if not a.get('url') else '[%s](%s)' % (a.get('title') or a['url'], a['url']),
              _html_text(a.get('description') or '')] for a in articles)
    return _Message(msgtype='text', text={'content': '\n\n'.join('\n'.join(filter(None, line)) for line in lines)})


def _bot_body(message):
    """→ 一帧里的，不是气泡的：文字是 markdown。"""
    kind = message['msgtype']
    return {'msgtype': 'markdown', 'markdown': message.body()} if kind == 'text' else {
        'msgtype': kind, kind: message.body()}


def _aes_blocks(blocks, key):
    """AES-256-CBC、PKCS#7 的一块一块 → 解密了的。短了的、填充不对的抛 `CryptoError`。"""
    aes, rest, size = _aes().new(key, _aes().MODE_CBC, key[:16]), b'', 0
    for block in blocks:
        rest += block
        size += len(block)
        whole = max(0, len(rest) - 32) // 16 * 16
        yield aes.decrypt(rest[:whole])
        rest = rest[whole:]
    if size < 32 or size % 16:
        raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error, 'cut：文件只有 %d 字节，没有收完' % size)
    rest = aes.decrypt(rest)
    padding = rest[-1]
    if not 1 <= padding <= 32 or rest[-padding:] != bytes([padding]) * padding:
        raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error, 'bad padding：文件的 aeskey 不对，或没有收完')
    yield rest[:-padding]


_LOOPBACK = re.compile(r'localhost|::1|127(\.[0-9]{1,3}){3}')


_JSON_TEXT = json.JSONEncoder(ensure_ascii=False).encode


def _frame_text(cmd, req_id, body=None):
    frame = {'cmd': cmd, 'headers': {'req_id': req_id}}
    if body is not None:
        frame['body'] = body
    return _JSON_TEXT(frame)


def _read_frame(text):
    """收到的一帧 (str 或 bytes) → dict；读不懂的是 {}，写日志。"""
    try:
        frame = json_to_dict(text.encode('utf-8') if isinstance(text, str) else text)
    except (ValueError, RecursionError) as e:
        logger.warning('not a frame: 读不懂的一帧，没有理会：%s', _show(e))
        return {}
    logger.debug('frame %s', _Shown(frame))
    return frame


def _refused(ack, cmd):
    code = ack.get('errcode')
    return APIError(code if isinstance(code, int) else -1, _show(ack.get('errmsg') or 'no errmsg', 400), cmd)


_HARMLESS = frozenset(['aibot_upload_media_init', 'aibot_upload_media_chunk', 'aibot_upload_media_finish'])
_BUSY = frozenset([45009, 45033, 846607])
_STALE = frozenset([6000, 846605, 846608, 600039])      #: 这条消息回复不了了：主动发送。


def _wrong(ack, cmd):
    """回执 (dict，没有是 None) → 错误；好的是 None。"""
    if ack is None:
        return NetworkError(504, 'no acknowledgement', cmd, '企业微信没有回执：消息可能已经到了，先看一眼再重发',
                            cmd not in _HARMLESS)
    if ack.get('errcode') == 846609:        # 没有订阅：没有发
        return _offline(cmd, None)
    return _refused(ack, cmd) if ack.get('errcode') else None


class _Kicked(Exception):
    """同一个机器人在别处连上了。"""


class _Session:
    """长连接的主人。``stage``：stopped、connecting、ready、waiting（断了，等着再连）、refused（凭据不对）、kicked。

    ``heard(连接, req_id, 命令, body)`` 收到了消息、事件；``ready()`` 连上了。
    """
    _retry = frozenset([-1, 6000, 846609])      #: 订阅的这些 errcode 过一会儿就好；别的是凭据不对、太频繁。

    def __init__(self, bot):
        self._bot, self.heard, self.ready = bot, None, None
        self._pauses, self._said, self._unknown = {}, '', set()
        self.failure = None                         # 最近一次没有连上的原因
        self.line, self._others, self._door = None, (), None
        self.users = None                           # 只为了发消息才连的：几个人在用；None 是一直运行的
        # changed：stage 和 line 变了；_life：这一次 start，停了是 None；_asked：req_id → 回执来了调用谁；
        # _forked：子进程里，这些描述符是父进程的
        _fresh(self, changed=threading.Condition, _lock=threading.Lock, _asked=dict, stage=lambda: 'stopped',
               _life=lambda: None, _forked=functools.partial(_Session._leave, weakref.proxy(self)))

    def _leave(self):
        for sock in (*self._others, *([self.line._sock] if self.line else ())):
            sock.close()
        self.line, self._others = None, ()

    def _become(self, life, stage, line=None):
        """→ 停了是 False：什么也不变。"""
        with self.changed:
            if self._life is not life:
                return False
            self.stage, self.line = stage, line
            self.changed.notify_all()
            return True

    def running(self):
        """这个进程里有它的线程。"""
        _check_fork()
        return self._life is not None

    def start(self, door=True):
        """占住名字，开始连。→ 名字被占着是 False；``door`` 为假是不管名字。"""
        listener = _listen(self._bot) if door else None
        if door and not listener:
            return False
        rest, wake = socket.socketpair()
        self._others, self._door = tuple(filter(None, (rest, listener, wake)))[:-1], _Door(self._bot, self)
        self._life = wake
        self._thread = _SEATS.start(self._run, wake)
        return True

    def join(self):
        """开始连；本机已经有一个在运行，就是它 (`_Guest`)，不连。"""
        for _ in range(4):
            if self.start():
                return None
            begin = time.monotonic()
            guest = _meet(self._bot)
            if guest:
                return guest
            if time.monotonic() - begin > 2:        # 占着名字，却不说话
                break
            time.sleep(0.3)                         # 也许正要结束
        logger.warning('the local name is taken: 本机有程序占着这个机器人的名字，却证明不了它是；照样连接')
        self.start(False)
        return None

    def stop(self, within=2):
        """说再见，断开；最多等 ``within`` 秒：那条线程也许还在查 DNS，它回来时看得见已经停了。"""
        with self.changed:
            wake, self._life, self.stage = self._life, None, 'stopped'
            self.changed.notify_all()
        if wake:
            wake.send(b'.')                 # 没有人读它：等着的、以后要等的，都醒着
            self._thread.join(within)
            for sock in (*self._others, wake):
                sock.close()
            self._others = ()

    def wait(self, within):
        """等连上，至多 ``within`` 秒 → 连上了没有；凭据不对、在别处连上了，不必等。"""
        with self.changed:
            self.changed.wait_for(lambda: self.stage in ('ready', 'refused', 'kicked', 'stopped'), within)
            return self.stage == 'ready'

    # 连接的那条线程

    def _run(self, life):
        bot = self._bot
        while self._become(life, 'connecting'):
            since, line = None, None
            try:
                line = _WebSocket(bot.url, bot.settings['ca_file'], bot.connect_within)
                early = self.subscribe(line)
                since = time.monotonic()
                self._serve(life, line, early)
                stage = None
            except _Kicked:
                stage, error = 'kicked', NetworkError(503, 'disconnected_event', hint='这个机器人在别处连上了，所以这里'
                                                      '断开：同一个 BotID 只能有一处在运行，停掉一处')
            except APIError as e:
                stage, error = 'waiting' if e.errcode in self._retry else 'refused', e
            except _FAILURES as e:
                stage, error = 'waiting', bot._failed(e)
            except Exception as e:          # 本文件的错；也要再连
                logger.error('internal error：长连接里，这个文件自己的错%s', _traceback())
                stage, error = 'waiting', bot._failed(e)
            self._lost(line)
            if stage:
                self._rest(life, stage, error, since)

    def subscribe(self, line):
        """第一帧。→ 回执以前就来了的帧；拒绝了抛 `APIError`，没有回执抛 `OSError`。"""
        settings, early, req_id = self._bot.settings, [], _new_id('aibot_subscribe')
        line.send(_frame_text('aibot_subscribe', req_id,
                              {'bot_id': settings['bot_id'], 'secret': settings['bot_secret']}))
        end = time.monotonic() + self._bot.connect_within
        while True:
            text = line.receive(end - time.monotonic())
            if text is None:
                raise socket.timeout('订阅没有回答')
            frame = _read_frame(text)
            headers = frame.get('headers')
            if not isinstance(headers, dict) or headers.get('req_id') != req_id or frame.get('cmd'):
                early.append(frame)
                continue
            if frame.get('errcode'):
                refusal = _refused(frame, 'aibot_subscribe')
                if refusal.errcode not in self._retry | _BUSY:
                    refusal.hint = ('BotID 或 Secret 不对：到「智能机器人 → API 模式 → 长连接」里一起复制；不是应用的 '
                                    'Secret，也不是 MCP 的 apikey')
                raise refusal
            return early

    def _serve(self, life, line, early):
        """连上了，到停下为止；断了抛 `OSError`、`_Kicked`。"""
        bot, ping = self._bot, time.monotonic() + self._bot.ping_every
        if not self._become(life, 'ready', line):
            return
        self.failure = None
        if self._said:
            logger.warning('long connection is back：长连接又连上了')
            self._said = ''
        if self.ready:
            self.ready()
        for frame in early:
            self._take(line, frame)
        skew = time.time() - time.monotonic()
        while self._life is life:
            now = time.monotonic()
            if now - line.heard > bot.silent_within:
                raise _Closed(1006, '%g 秒没有听到一个字节' % bot.silent_within)
            if time.time() - now - skew > bot.silent_within + bot.ping_every:
                raise _Closed(1006, '这台机器休眠过')       # monotonic 在休眠时不走
            if now >= ping:
                if not line.busy():
                    line.send(_frame_text('ping', _new_id('ping')))
                    ping = now + bot.ping_every
                else:
                    ping = now + 1
            text = line.receive(min(ping, line.heard + bot.silent_within + 0.01) - now, self._others)
            if isinstance(text, socket.socket):
                self._door.open(text)
            elif text is not None:
                self._take(line, _read_frame(text))

    def _take(self, line, frame):
        """收到的一帧。"""
        cmd, headers, body = frame.get('cmd'), frame.get('headers'), frame.get('body')
        req_id = headers.get('req_id') if isinstance(headers, dict) else None
        if not cmd:
            with self._lock:
                then = self._asked.pop(req_id, None) if isinstance(req_id, str) else None
            if then:
                then(frame)
            if frame.get('errcode') == 846609:
                raise _Closed(1006, '订阅没有了 (846609)')
        elif cmd in ('aibot_msg_callback', 'aibot_event_callback') and isinstance(body, dict):
            event = body.get('event')
            kicked = isinstance(event, dict) and event.get('eventtype') == 'disconnected_event'
            if self.heard:
                self.heard(line, str(req_id), body)
            else:
                logger.warning('a message came while we only send: 没有回答；要回答，让机器人一直运行')
            if kicked:
                raise _Kicked
        elif str(cmd) not in self._unknown and len(self._unknown) < 100:
            self._unknown.add(str(cmd))
            logger.info('unknown command %s：没有听说过，不理', _show(cmd))

    def _lost(self, line):
        """连接完了：等回执的，不必等了。"""
        with self.changed:
            self.line = None if self.line is line else self.line
        if line:
            line.close()                    # 从此发不出去：再没有谁等回执
        with self._lock:
            asked, self._asked = self._asked, {}
        for then in asked.values():
            then(None)

    def _rest(self, life, stage, error, since):
        """说一次为什么断了，停一停：1、2、4 … 30 秒；凭据不对、在别处连上了的，60 秒到一小时。"""
        bot, self.failure = self._bot, error
        fast = stage == 'waiting'
        first, most = (bot.pause, bot.pause_most) if fast else (bot.slow_pause, bot.slow_pause_most)
        served = time.monotonic() - since if since else 0
        steady = bot.slow_pause_most if stage == 'kicked' else bot.steady_after
        pause = first if served >= steady else self._pauses.get(stage, first)
        self._pauses[stage] = min(2 * pause, most)
        if fast:
            pause *= 1 + (0.2 if pause < most else -0.2) * os.urandom(1)[0] / 255       # 不一起来
        text = str(error)
        say = logger.info if text == self._said and not since else logger.warning if fast else logger.error
        say('long connection %s：%s；%.3g 秒后再连', 'lost' if since else 'failed', text, pause)
        self._said = text
        end = time.monotonic() + pause
        self._become(life, stage)
        while self._life is life and time.monotonic() < end:
            found = _ready(None, False, end - time.monotonic(), self._others)
            if found:
                self._door.open(found)

    # 任何线程

    def tell(self, cmd, body, req_id, then):
        """发一帧，不等：回执来了 ``then(回执)``，断了 ``then(None)``，在收的那条线程上。没有发出去抛 503。"""
        line = self.line
        if not line:
            raise _offline(cmd, self.failure)
        with self._lock:
            self._asked[req_id] = then
        try:
            line.send(_frame_text(cmd, req_id, body))
        except OSError as e:
            with self._lock:
                self._asked.pop(req_id, None)
            raise _offline(cmd, self._bot._failed(e)) from None

    def give_up(self, req_id):
        """不等它的回执了。"""
        with self._lock:
            then = self._asked.pop(req_id, None)
        if then:
            then(None)

    def ask(self, cmd, body, req_id=None, within=None):
        """发一帧，等它的回执 → dict。没有发出去抛 `NetworkError` 503，没有等到回执 504，拒绝了 `APIError`。"""
        gate, req_id, acks = threading.Lock(), req_id or _new_id(cmd), []
        gate.acquire()

        def then(ack):
            acks.append(ack)
            gate.release()
        self.tell(cmd, body, req_id, then)
        if not gate.acquire(timeout=within or self._bot.ack_within):
            self.give_up(req_id)
        error = _wrong(acks[0] if acks else None, cmd)
        if error:
            raise error
        return acks[0]

    def push(self, body, tell=None):
        """主动发一条；太快了就等，``tell(秒)`` 说要等多久。太频繁 (45009) 等一等，再来一次。"""
        bot = self._bot
        for last in False, True:
            slot, seconds = bot._pace.turn([body['chatid']], {60: bot.per_minute, 3600: bot.per_hour}, bot._clock)
            if seconds > 0:
                tell and tell(seconds)
                bot._sleep(seconds)
            try:
                return self.ask('aibot_send_msg', body)
            except APIError as e:
                if last or e.errcode not in _BUSY:
                    raise
            finally:
                slot[0] = max(slot[0], bot._clock())
            logger.warning('too often：企业微信说太频繁，%g 秒后再试', bot.busy_pause)
            tell and tell(bot.busy_pause)
            bot._sleep(bot.busy_pause)

    def _step(self, end, cmd, body):
        """上传的一步 → 回执的 body；断了，连上以后接着来：每一步再来一次也没关系。"""
        while True:
            try:
                ack = self.ask(cmd, body, within=self._bot.chunk_within)
                return ack['body'] if isinstance(ack.get('body'), dict) else ack
            except NetworkError:
                if self._bot._clock() >= end or not self.wait(end - self._bot._clock()):
                    raise

    def upload(self, file, kind):
        """`_File` → media_id。一块一块地传；断了再连，接着传。"""
        bot = self._bot
        kind, end = _media_kind(file, kind), bot._clock() + bot.upload_within
        digest, total = hashlib.md5(), -(-file.size // _CHUNK)
        with file.open() as f:
            for block in iter(functools.partial(f.read, 1 << 16), b''):
                digest.update(block)
        upload_id = self._step(end, 'aibot_upload_media_init', {
            'type': kind, 'filename': _UNPRINTABLE.sub('_', _decoded(file.name)), 'total_size': file.size,
            'total_chunks': total, 'md5': digest.hexdigest()}).get('upload_id')
        with file.open() as f:
            for n in range(total):
                data = binascii.b2a_base64(f.read(_CHUNK), newline=False).decode()
                self._step(end, 'aibot_upload_media_chunk',
                           {'upload_id': upload_id, 'chunk_index': n, 'base64_data': data})
                if bot.progress:
                    bot.progress(min(file.size, (n + 1) * _CHUNK), file.size)
        media_id = self._step(end, 'aibot_upload_media_finish', {'upload_id': upload_id}).get('media_id')
        if not isinstance(media_id, str):
            raise NetworkError(502, '回答里没有 media_id', 'aibot_upload_media_finish')
        return media_id


def _bot_download(caller, handle, folder):
    """``网址#aeskey`` → 下载、解密了的 `pathlib.Path`。"""
    url, _, aeskey = str(handle or '').rpartition('#')
    parts = _split_url(url)
    if parts.scheme != 'https' and not _LOOPBACK.fullmatch(parts.hostname):
        raise ValueError('不是 https 的网址：%s' % _show(url))
    key, aeskey = b'', aeskey or caller.settings['encoding_aes_key']        # 回调 URL 的，用 EncodingAESKey
    with contextlib.suppress(ValueError):
        key = binascii.a2b_base64(aeskey + '=' * (-len(aeskey) % 4))
    if len(key) != 32:
        raise CryptoError(ierror.WXBizMsgCrypt_IllegalAesKey, 'no aeskey：这个文件没有带着能用的 aeskey')
    _aes()                              # 没有装，现在就说
    attempt = _Attempt(_FETCHES, caller._urllib(), url, None, {}, caller.media_within, caller.connect_within, 3)

    def write(f):
        answer = _Answer(attempt, parts.netloc.rpartition('@')[2], float('inf'))
        if answer.status != 200:
            raise NetworkError(502, '文件没有了，状态 %d' % answer.status, hint='文件下载不了：网址五分钟有效')

        def save():
            for data in _aes_blocks(_blocks(answer._response, caller.max_download), key):
                with _local():
                    f.write(data)
        try:
            answer._do(save)
        except _Local as e:
            raise e.args[0] from None
        return _file_name(_name_in(answer.headers) or '', answer.headers.get_content_type())
    try:
        return _saved(folder, write)
    finally:
        attempt.hang_up()


class WeChatBot(_Caller):
    """智能机器人（path/101463）：经过长连接，不要公网地址、可信 IP、任何包。

        WeChatBot('demo').send('磁盘 91%')  # 发给 touser：userid，或群的 chatid

    要有 bot_id 和 bot_secret。`WeChatServer` 在运行（这个进程，或本机别的进
    程），就由它发；没有，就自己连一下，发完断开，这时别的机器上在运行的会断开
    一分钟。只能发给跟机器人说过话的人和群。被拒绝抛 `APIError`，没有回答抛
    `NetworkError`。

    时限和上限，在子类里改，或给实例；单位是秒：

        connect_within = 10     # 连接、握手、订阅，各这么久
        ping_every = 30         # 心跳
        silent_within = 65      # 这么久一个字节都没有，就是断了
        pause = 1               # 断了以后停多久再连，每次加倍
        pause_most = 30         # 最多停这么久
        steady_after = 60       # 连着这么久，下一次又从 pause 开始
        slow_pause = 60         # 凭据不对、在别处连上了，停多久再连，每次加倍
        slow_pause_most = 3600  # 最多停这么久；连着这么久，才从 slow_pause 再来
        ack_within = 15         # 等一帧的回执
        chunk_within = 30       # 等上传的一块的回执
        upload_within = 600     # 一次上传，断了再接着传也在内
        offline_within = 15     # 要发的时候断着，等它连上
        hand_over_within = 30   # 等在运行的机器人发完
        per_minute = 30         # 每分钟最多给一个人、一个群发几条
        per_hour = 1000         # 每小时
        busy_pause = 60         # 企业微信说太频繁，停多久再来一次
        clash_pause = 0.2       # 两帧撞上了 (6000)，停多久再来，然后四倍、九倍
        slow_after = 2.5        # 回调这么久没有结果，先开一个气泡
        frame_every = 1         # 气泡一秒至多一帧
        fast_frames = 20        # 这么多帧以后，两倍的时间一帧
        bubble_within = 330     # 气泡这么久就写完，其余的另外发：企业微信等 6
                                # 分钟
        event_within = 5        # 欢迎语、更新卡片要在这以内
    """

    connect_within: float = 10
    ping_every: float = 30
    silent_within: float = 65
    pause: float = 1
    pause_most: float = 30
    steady_after: float = 60
    slow_pause: float = 60
    slow_pause_most: float = 3600
    ack_within: float = 15
    chunk_within: float = 30
    upload_within: float = 600
    offline_within: float = 15
    hand_over_within: float = 30
    per_hour: int = 1000
    busy_pause: float = 60
    clash_pause: float = 0.2
    slow_after: float = 2.5
    frame_every: float = 1
    fast_frames: int = 20
    bubble_within: float = 330
    event_within: float = 5

    def __init__(self, appname: 'Union[str, Dict[str, str]]' = 'demo', ini_name: 'Optional[str]' = None,
                 **settings: 'Union[None, str, int]') -> None:
        super().__init__(appname, ini_name, ('bot_id',), settings)
        if not (self.settings['token'] and self.settings['encoding_aes_key']):
            _require(self.settings, 'bot_secret')
        self.url = self.settings['bot_url'] or _BOT_URL
        parts = urllib.parse.urlsplit(self.url)
        if not re.fullmatch(r'wss://[!-~]+', self.url) and not (
                re.fullmatch(r'ws://[!-~]+', self.url) and _LOOPBACK.fullmatch(parts.hostname or '')):
            raise ConfigError('bot_url 应该像 wss://openws.work.weixin.qq.com（ws:// 只能连本机）')
        self._session = _Session(self)
        _fresh(self, _joining=threading.Lock)

    def __repr__(self):
        return '<%s %s>' % (type(self).__name__, _mask(self.settings['bot_id']))

    @property
    def connected(self) -> bool:
        """这个进程的长连接通着 (bool)。"""
        return self._session.stage == 'ready'

    def _failed(self, error):
        """连不上、断了 → `NetworkError`。"""
        host = urllib.parse.urlsplit(self.url).netloc.rpartition('@')[2]
        if isinstance(error, _Closed):
            return NetworkError(503, 'closed with %d %s' % (error.args[0], _show(error.args[1])), hint='长连接断了')
        failure = _failure(error, host, False)
        failure.hint = failure.hint.replace('api_base', 'bot_url')
        return failure

    @contextlib.contextmanager
    def _road(self):
        """→ 能发的：这个进程的长连接，本机在运行的机器人，或自己连一下。"""
        session = self._session
        if not self.settings['bot_secret']:
            raise ConfigError('没有写 bot_secret：回调 URL 的智能机器人不能主动发送；在后台改用长连接，写上 Secret')
        with self._joining:                         # 几条线程一起发：一条去连，别的用它连上的
            guest = None
            if not session.running():
                session.users = 0
                guest = session.join()
            mine = not guest and session.users is not None
            if mine:
                session.users += 1
        try:
            if not guest and not session.wait(max(self.offline_within, self.retry_within)):
                raise copy.copy(session.failure) or _offline('', None)
            yield guest or session
        finally:
            if guest:
                guest.close()
            with self._joining:
                session.users = session.users - 1 if mine else session.users
                if mine and not session.users:
                    session.stop()

    def send(self, message: 'Sendable', to: 'Who' = None) -> 'Message':
        """发一条或几条消息，依次 → 最后一条的回执 (dict)。

        ``message`` 同 `WeChatClient.send`：文字是 Markdown，超过 20480 字节就
        分成几条；`pathlib.Path` 先上传。
        ``to``：userid 或群的 chatid，几个用 list 或 ``'a|b'``；没有就是配置里
        的 touser。
        """
        chats = _joined(self.settings['touser'] if to is None else to).split('|')
        if not chats[0] or '@all' in chats:
            raise APIError(82001, 'no receiver', 'aibot_send_msg', '没有写收件人：只能发给跟机器人说过话的人和群，'
                           '给 to，或在 config.ini 里写 touser（不能是 @all）')
        with self._road() as road:
            return self._send_each('aibot_send_msg', message, _BOT_LIMITS,
                                   functools.partial(self._prepare, road, chats))

    def _prepare(self, road, chats, n, message):
        message = _bot_form(message)
        kind = message['msgtype']
        _need(kind not in ('update_template_card', 'stream'), '%s 只能做回复，不能主动发送' % kind)
        return (road, chats), _bot_body(self._uploaded(road, message))

    def _uploaded(self, road, message):
        """还没有上传的，收到的 (MediaId) → 上传了。"""
        handle = message.body().get('media_id') if message['msgtype'] in _MEDIA else None
        if isinstance(handle, str) and '://' in handle:
            import tempfile
            with tempfile.TemporaryDirectory() as folder:
                path = _bot_download(self, handle, folder)
                return message.with_body(media_id=road.upload(_File(path), message['msgtype']))
        file = message.file()
        return message.with_body(media_id=road.upload(_File(file), message['msgtype'])) if file else message

    def _send_one(self, path, who, message):
        road, chats = who
        for n, chat in enumerate(chats):
            try:
                answer = road.push(dict(message, chatid=chat))
            except APIError as e:
                e.errmsg += ' (to %s%s)' % (_show(chat), '，前面的 %d 条发了' % n if n else '')
                raise
        return answer

    def upload(self, path: 'File', kind: 'Optional[str]' = None, name: 'Optional[str]' = None) -> str:
        """上传 → media_id (str)，三天有效，只有这个机器人能用。参数同
        `WeChatClient.upload`。
        """
        with self._road() as road:
            return road.upload(_File(path, name), kind)

    def download(self, msg: 'Message', folder: 'Union[None, str, os.PathLike[str]]' = None) -> 'Path':
        """收到的图片、文件、视频 → 下载、解密了的 `pathlib.Path`；五分钟以内。参
        数同 `WeChatServer.download`。
        """
        return _bot_download(self, msg.get('MediaId'), folder)


# ---- 气泡 Bubbles ------------------------------------------------------------------------------
# 回调给的东西怎样到智能机器人的用户那里。长连接 (_BotReplies)：文字是一个气泡 (stream)，边长边发，每帧是到现在为止的
# 全文；别的接着回复；req_id 没有用了（断过、太久）就主动发送。回调 URL (_PollReplies)：企业微信来问气泡长到哪里了，它在
# 存储里。气泡开着，就一定写完：不然一直转圈。

class _Text:
    """一段要送的文字；`Stream` 的，还在长。"""
    def __init__(self, text='', ended=True):
        self._parts, self._ended, self._newer = [text], ended, True
        self._changed = threading.Condition()

    def add(self, text, ended=False):
        with self._changed:
            self._parts.append(text)
            self._newer, self._ended = True, self._ended or ended
            self._changed.notify_all()

    def now(self, ended=False):
        """现在的全文；``ended`` 为真，还在长的是 ''。"""
        return ''.join(self._parts) if self._ended or not ended else ''

    def look(self, end, more=1):
        """等到写完，或过了 ``end`` 又有了新的（至多再等 ``more`` 秒）→（全文，写完了没有，有没有新的）。"""
        with self._changed:
            self._changed.wait_for(lambda: self._ended, max(0, end - time.monotonic()))
            self._changed.wait_for(lambda: self._ended or self._newer, max(0.001, more))
            newer, self._newer = self._newer, False
            self._parts = [''.join(self._parts)]
            return self._parts[0], self._ended, newer

    def cut(self, end, head):
        """前 ``end`` 个字已经送到了；后面的以 ``head`` 开头。"""
        with self._changed:
            rest = ''.join(self._parts)[end:]
            self._parts, self._newer = [(head + rest) if rest.strip() else ''], True


def _json_bytes(value):
    return _JSON_TEXT(value).encode('utf-8', 'replace')


def _bubble(stream_id, content, finish):
    return {'msgtype': 'stream', 'stream': {'id': stream_id, 'finish': finish, 'content': content}}


class _Talk:
    """智能机器人的一条消息，和它的答复。"""
    __slots__ = ('run', 'kind', 'user', 'id', 'chat', 'event', 'begin', 'line', 'req_id', 'items', 'busy', 'over',
                 'bubble', 'since', 'last', 'frames', 'clashes', 'stale', 'spoken', 'opened', 'told', 'closing')

    def __init__(self, run, closing):
        msg = run.message
        self.run, self.line, self.req_id, self.begin = run, msg.line, msg.req_id, time.monotonic()
        self.kind, self.user, self.id, self.chat = msg['MsgType'], run.sender, msg['MsgId'], msg['ChatId'] or run.sender
        self.event = msg.get('Event', '') if self.kind == 'event' else ''
        self.items = collections.deque()        # 还没送的，依次：_Text、_Message；'' 是开一个气泡，None 是写完它
        self.busy = self.over = False           # 有线程在送；回调完了
        # 开着的气泡：它的 id，第一帧、最近一帧的时刻，几帧；连着几次撞上 6000
        self.bubble, self.since, self.last, self.frames, self.clashes = None, 0, 0, 0, 0
        self.stale = bool(self.event)           # 不能用 req_id 回复：主动发送
        self.spoken = self.opened = False       # 有过文字了；要过占位的气泡了
        self.told = 0                           # 何时发的，不等回执的那一帧
        self.closing = closing                  # 没有东西可送，就用它写完气泡


class _BotResults(_Results):
    """智能机器人的 replies，两条路一样的。"""
    keeps = True                        #: 还没有轮到跑的，也开一个气泡。

    def _failed(self, parcel, func, error):
        parcel.closing = '出错了'
        super()._failed(parcel, func, error)

    def _messages(self, parcel, item):
        """回调给的一条 → 智能机器人能发的 `_Message`。"""
        parts = [item]
        if isinstance(item, dict) and item.get('MsgType') and not item.get('MediaId') and isinstance(
                item.get('Content'), str):          # 原样返回的语音、图文：文字，和图文里的图片
            pictures = [part for part in item.get('MsgItems') or () if part.get('MsgType') == 'image']
            parts = [item['Content']] * bool(item['Content'].strip() or not pictures) + pictures
        for part in parts:
            yield from map(_bot_form, _made(part, parcel.kind, _BOT_LIMITS))


class _BotReplies(_BotResults):
    """`Once` 的 replies，长连接的。一条消息的答复依次送，各条消息互不等待；断着的时候留着，连上了主动发送。"""
    hold_within = float('inf')      #: 企业微信不再投递：一直等到轮到它。

    def __init__(self, owner, bot):
        super().__init__(owner)
        self._bot, self._session, self._threads = bot, bot._session, _Threads(256)
        _fresh(self, lock=threading.Lock, _talks=dict, _under_way=set)     # _talks：没有完的，先来的在前

    slow = property(lambda self: self._bot.slow_after)

    def heard(self, line, req_id, body):
        """收到了一条消息、一个事件：投递。"""
        owner = self._owner
        msg = _bot_message(body, owner.settings['bot_name'])
        msg.line, msg.req_id = line, req_id
        owner._met(msg)
        wanted = owner._callback_for(msg)[0] if msg.get('Event') != 'disconnected_event' else \
            owner._callbacks.knows('event:disconnected_event')      # 没有人，没有会话：说了要的才给
        if wanted:
            deliver = functools.partial(owner._once.deliver, owner._keys.of(msg), msg, id, owner._once.spawn, self)
            if isinstance(owner.store, MemoryStore) or not owner._once.errand(deliver):
                deliver()

    def expect(self, run):
        run.parcel = _Talk(run, self._owner.bot_no_answer)
        with self.lock:
            self._talks[run.parcel] = True

    def late(self, run, up, last):
        """回调慢了：开一个气泡；气泡到了时候，先写完。"""
        talk = run.parcel
        if not talk or talk.stale or talk.items or talk.over:
            return
        if talk.bubble and time.monotonic() - talk.since >= self._bot.bubble_within:
            self._put(talk, _Text('（还没有好，好了再发）'))
        elif not talk.opened:
            self._put(talk, '')

    def _open(self, talk):
        """先开一个气泡，里面是占位的字；有过气泡了、不要占位，就不开。"""
        words, talk.opened = self._owner.settings['bot_placeholder'], True
        if words and not talk.spoken and not talk.stale:
            self._frame(talk, words, False)

    def left(self):
        with self.lock:
            return list(self._talks)

    def look(self):
        """时间到了，连上了：没送完的，再送；没有等到回执的，不等了。"""
        for talk in self.left():
            self._kick(talk)
            if talk.told and time.monotonic() > talk.told + self._bot.ack_within:
                self._session.give_up(talk.req_id)

    def close(self):
        """要停下了：开着的气泡，都写完；回执一共等 0.3 秒。"""
        acked, count, end = threading.Semaphore(0), 0, time.monotonic() + 0.3
        for talk in self.left():
            if talk.bubble and talk.line is self._session.line:
                text = talk.items[0].now() if talk.items and isinstance(talk.items[0], _Text) else ''
                body = _bubble(talk.bubble, text if text.strip() else talk.closing, True)
                with contextlib.suppress(APIError):
                    self._session.tell('aibot_respond_msg', body, talk.req_id, lambda ack: acked.release())
                    count += 1
        while count and acked.acquire(timeout=max(0, end - time.monotonic())):
            count -= 1

    def _add(self, parcel, message):
        return self._put(parcel, _Text(message.body()['content']) if message['msgtype'] == 'text' else message)

    def _put(self, talk, item):
        with self.lock:
            talk.items.append(item)
        self._kick(talk)
        return True

    def _stream(self, parcel, func, stream):
        text, words = _Text(ended=False), '\n\n（出错了）'
        self._put(parcel, text)
        try:
            for piece in stream.pieces(self._under_way):
                text.add(piece)
            words = ''
        finally:
            text.add(words * bool(text.now().strip()), True)
        return True

    def _over(self, parcel):
        parcel.run.conclude(b'')
        parcel.over = True
        self._kick(parcel)

    # 送：一条消息的，同时只有一条线程

    def _kick(self, talk):
        with self.lock:
            if talk.busy or talk not in self._talks:
                return
            if talk.over and not talk.items and (not talk.bubble or talk.stale):
                del self._talks[talk]
                return
            talk.busy = True
        if not self._quick(talk) and not self._threads.submit(0, self._drain, talk):
            talk.busy = False

    def _quick(self, talk):
        """多半只有一段写完了的文字：这条线程就发了，谁也不等回执。→ 发了没有。"""
        item = talk.items[0] if talk.items and not (talk.spoken or talk.stale) else None
        text = item.now(ended=True) if isinstance(item, _Text) else ''
        if not text.strip() or 4 * len(text) > 20480 or talk.line is not self._session.line:
            return False
        talk.bubble, talk.since, talk.spoken, talk.told = _new_id('stream'), time.monotonic(), True, time.monotonic()
        try:
            self._session.tell('aibot_respond_msg', _bubble(talk.bubble, text, True), talk.req_id,
                               functools.partial(self._told, talk))
            return True
        except APIError:
            talk.told = 0
            return False

    def _told(self, talk, ack):
        """`_quick` 的回执。"""
        error, talk.told = _wrong(ack, 'aibot_respond_msg'), 0
        if not error:
            with self.lock:
                talk.items.popleft()
                talk.bubble, talk.busy = None, False
            self._kick(talk)
        elif not self._threads.submit(0, self._drain, talk, error):
            talk.busy = False

    def _drain(self, talk, error=None):
        """依次送。``error``：第一条发过了，这样错的。"""
        while True:
            with self.lock:
                if not talk.items and talk.over and talk.bubble and not talk.stale:
                    talk.items.append(None)
                if not talk.items or not self._session.line and not error:
                    talk.busy = False
                    if talk.over and not talk.items:
                        self._talks.pop(talk, None)
                    return
                item = talk.items[0]
            try:
                failed, error = error, None
                if failed:
                    self._frame_failed(talk, failed, True)
                self._send(talk, item)
            except Exception as e:          # 别人的代码、别人的网络；别的还要接着送
                if isinstance(e, _Offline):
                    time.sleep(0.05)
                    continue
                talk.bubble = talk.bubble if item else None         # 写不完的气泡，不再写
                logger.error('not delivered to %s：消息 %s 的答复没有送到：%s', _show(talk.chat), _show(talk.id),
                             _show(e, 400))
            with self.lock:
                talk.items.popleft()

    def _fresh_event(self, talk):
        return talk.line is self._session.line and time.monotonic() - talk.begin < self._bot.event_within

    def _send(self, talk, item):
        talk.stale = talk.stale or talk.line is not self._session.line      # 那条连接断了，req_id 就没有用了
        if item == '':
            return self._open(talk)
        if isinstance(item, _Text):
            return self._say(talk, item)
        while talk.bubble and not talk.stale and not self._frame(talk, '（见下一条）' if item else talk.closing, True):
            pass                        # 开着的，不是文字来写完它
        if item is None:
            return None
        message = self._bot._uploaded(self._session, item)
        kind = message['msgtype']
        if kind == 'update_template_card':
            _need(talk.event == 'template_card_event', '只有 template_card_event 能用更新卡片来答')
            if not self._fresh_event(talk):
                return logger.error('too late: 更新卡片要在 %g 秒以内，没有更新', self._bot.event_within)
            body = dict(message, response_type=kind)
            del body['msgtype']
            return self._session.ask('aibot_respond_update_msg', body, talk.req_id)
        return self._welcome(talk, _bot_body(message)) or self._post(talk, _bot_body(message))

    def _welcome(self, talk, body):
        """进入会话的第一条 → 送到了没有；别的、晚了的，主动发送。"""
        if talk.event != 'enter_chat' or talk.spoken or body['msgtype'] not in ('text', 'template_card') or \
                not self._fresh_event(talk):
            return False
        talk.spoken = True
        return self._replied(talk, 'aibot_respond_welcome_msg', body)

    def _post(self, talk, body):
        """又一条：接着回复；回复不了的，主动发送。"""
        return not talk.stale and self._replied(talk, 'aibot_respond_msg', body) or self._session.push(
            dict(body, chatid=talk.chat))

    def _replied(self, talk, cmd, body):
        """用 req_id 回复 → 送到了没有：已经不能回复了，太频繁（停一停），就主动发送。"""
        try:
            return bool(self._session.ask(cmd, body, talk.req_id))
        except APIError as e:
            if e.errcode not in _STALE | _BUSY:
                raise
            talk.stale = talk.stale or e.errcode in _STALE
            if e.errcode in _BUSY:
                self._bot._sleep(self._bot.busy_pause)
            return False

    def _say(self, talk, text):
        """一段文字：一个气泡，边长边发；太长的、太久的，先写完，其余的接着发。"""
        while True:
            pause = self._bot.frame_every * (1 + (talk.frames >= self._bot.fast_frames))
            slow = 1 if talk.opened else talk.begin + self._bot.slow_after - time.monotonic()
            whole, ended, newer = text.look(talk.last + pause if talk.bubble and not talk.stale else 0, min(1, slow))
            if not (ended or whole.strip() or talk.opened) and talk.begin + self._bot.slow_after <= time.monotonic():
                self._open(talk)
            talk.stale = talk.stale or talk.line is not self._session.line
            old = bool(talk.bubble) and time.monotonic() - talk.since >= self._bot.bubble_within
            piece, end, head = next(_cuts(whole, 20480 - 3 * old), ('', len(whole), ''))      # 也许要加一个 …
            done = ended or end < len(whole)
            if not piece.strip() and ended:
                if not talk.bubble or talk.stale:
                    return None
                piece = talk.closing
            if not piece.strip() or not (done or old and not talk.stale or newer and not talk.stale):
                continue
            if self._part(talk, piece, done, old) and (done or old):
                text.cut(end, head)
                if ended and end >= len(whole):
                    return None

    def _part(self, talk, piece, done, old):
        """→ 送到了没有；没有就再来。"""
        body = {'msgtype': 'text', 'text': {'content': piece}}
        if talk.stale:
            return done and (self._welcome(talk, body) or self._session.push(
                {'msgtype': 'markdown', 'markdown': {'content': piece}, 'chatid': talk.chat}))
        if done and talk.spoken and not talk.bubble:
            return self._post(talk, {'msgtype': 'markdown', 'markdown': {'content': piece}})
        if old and not done:
            sent = self._frame(talk, piece + '…', True)
            talk.stale = True               # 其余的主动发送
            return sent
        return self._frame(talk, piece, done)

    def _frame(self, talk, content, finish):
        """气泡的一帧 → 送到了没有；没有就再来，或者已经不能回复了 (``stale``)。"""
        now = time.monotonic()
        if not talk.bubble:
            talk.bubble, talk.since, talk.frames = _new_id('stream'), now, 0
        talk.last, talk.spoken = now, True
        try:
            self._session.ask('aibot_respond_msg', _bubble(talk.bubble, content, finish), talk.req_id)
        except APIError as e:
            self._frame_failed(talk, e, finish)
            return False
        talk.frames, talk.clashes = talk.frames + 1, 0
        if finish:
            talk.bubble = None
        return True

    def _frame_failed(self, talk, error, finish):
        """一帧错了：再来也没有用的，抛它；别的停一停，或者从此主动发送。"""
        code = error.errcode
        if code == 6000 and talk.clashes < 3:
            talk.clashes += 1
            self._bot._sleep(self._bot.clash_pause * talk.clashes ** 2)
        elif code in _STALE or isinstance(error, NetworkError) and not finish:
            talk.stale = True
        elif code in _BUSY and (not finish or talk.clashes < 4):
            talk.clashes = max(talk.clashes, 4 * finish)
            self._bot._sleep(self._bot.busy_pause if finish else 2 * self._bot.frame_every)
        else:
            if not isinstance(error, _Offline) and (isinstance(error, NetworkError) or not talk.frames):
                talk.bubble = None              # 也许写完了；或者就没有它
            raise error


class _Poll:
    """JSON 的一条消息，和它的答复：一个气泡 (stream)，企业微信一秒来问一次它长到哪里了。"""
    __slots__ = ('run', 'kind', 'user', 'id', 'event', 'url', 'begin', 'stream', 'words', 'closing', 'text', 'images',
                 'cards', 'open', 'last', 'sent', 'head', 'owed', 'lock', 'saved', 'newer', 'record')

    def __init__(self, run, words, closing):
        msg = run.message
        self.run, self.kind, self.user, self.id, self.begin = run, msg['MsgType'], run.sender, msg['MsgId'], run.begin
        self.event = str(msg.get('Event') or '?') if self.kind == 'event' else ''
        self.url, self.stream = msg.get('response_url'), _new_id('stream')
        self.url = self.url if isinstance(self.url, str) else ''
        self.words, self.closing = words, closing       # 气泡里还没有字，写完了也没有字，用的
        self.text, self.images, self.cards = '', [], []
        self.open, self.last = False, None      # 先答了一个没有写完的气泡；它的最后一帧 (bytes)
        self.sent, self.head = 0, ''            # 前面多少个字已经答了；其余的以什么开头
        self.owed = False                       # 气泡写完的时候什么也没有，说了好了再发
        self.lock = threading.Lock()            # 答、写完气泡的时候拿着
        self.saved, self.newer = float('-inf'), False       # 什么时候存的；又长了没有
        self.record = threading.Lock()          # 写它在存储里的记录时拿着：存储可能很慢

    def frame(self):
        """现在的一帧 (bytes)。"""
        text = next(_cuts(self.text, 20480), ('',))[0]
        return self.last or _json_bytes(_bubble(self.stream, text if text.strip() else self.words, False))

    def finish(self, more='', blank=''):
        """写完气泡：它的最后一帧。``more`` 接在文字后面；``blank`` 是没有文字的时候写的。"""
        text, self.sent, self.head = next(_cuts(self.text, 20480 - len(more.encode('utf-8'))), ('', 0, ''))
        if not text.strip():
            text, more = '（图片）' if self.images else blank or self.closing, ''
        body = _bubble(self.stream, text + more, True)
        if self.images:
            body['stream']['msg_item'] = self.images
        self.last = _json_bytes(body)


class _PollReplies(_BotResults):
    """`Once` 的 replies，JSON 回调的：一条消息的文字合成一个气泡。这个进程的，问的时候现写；别的进程的，在存储里。

    谁也不拿着 ``poll.lock`` 等存储；看时间的线程哪一把锁也不等。
    """
    most = 40960  #: 一条消息的文字最多这么多个：一个气泡，加上 response_url 的一条。

    def __init__(self, owner, bot):
        super().__init__(owner)
        self._bot = bot
        _fresh(self, _live=dict, _under_way=set)        # 在跑的、开了气泡的：stream 的 id → _Poll

    slow = property(lambda self: self._owner.answer_within * 2 / 3)
    hold_within = property(lambda self: 2 * self._owner.hold_within)    # 到 answer_within 一定答：看时间的来得晚，也答

    def poll(self, msg):
        """企业微信来问 → 答复 (bytes)；不认得的、过期的，写完它，不然一直转圈。"""
        stream = msg.get('stream')
        stream_id = str(stream.get('id') or '') if isinstance(stream, dict) else ''
        poll = self._live.get(stream_id)
        return poll.frame() if poll else self._owner.store.get('easywechat:stream:' + stream_id) or _json_bytes(
            _bubble(stream_id, self._owner.bot_no_answer, True))

    def expect(self, run):
        run.parcel = _Poll(run, self._owner.settings['bot_placeholder'], self._owner.bot_no_answer)

    def make(self, run):
        self._live[run.parcel.stream] = run.parcel
        try:
            super().make(run)
        finally:
            self._live.pop(run.parcel.stream, None)         # 回调里 fork 出来的进程没有它

    def late(self, run, up, last):
        """回调慢了：气泡先存下来；该答了，先答一个没有写完的。"""
        poll = run.parcel
        if up and poll.lock.acquire(False):     # 拿不到：回调完了，正要答
            try:
                if run.reply is None:
                    poll.open = not poll.event
                    if poll.open:           # 还没有轮到跑，也有人来问
                        self._live[poll.stream] = poll
                    run.conclude(poll.frame() if poll.open else b'{}')
            finally:
                poll.lock.release()
        self._keep(poll)

    def left(self):
        return list(self._live.copy().values())

    def look(self):
        """时间到了：长了的存下来，太久的先写完。"""
        for poll in self.left():
            if not poll.open or poll.last:
                continue
            if time.monotonic() - poll.begin < self._bot.bubble_within:
                self._keep(poll)
            else:
                self._owner._once.errand(self._shut, poll, '（还没有好，好了再发）' if poll.url else '')

    def close(self):
        """要停下了：开着的气泡，都写完。"""
        for poll in self.left():
            self._shut(poll)

    def _keep(self, poll):
        """别的进程也要答得出：长了的、快到期的，存下来。这个进程没有了，记录很快到期，气泡就不再转圈。"""
        due = poll.newer or time.monotonic() > poll.saved + 5 * self._owner.lease
        if due and not poll.event and not isinstance(self._owner.store, MemoryStore):
            self._owner._once.errand(self._save, poll, False)

    def _save(self, poll, wait=True):
        if poll.record.acquire(wait):       # 上一次还没写完，又长了的下次再说
            try:
                poll.newer, poll.saved = False, time.monotonic()
                self._owner.store.set('easywechat:stream:' + poll.stream, poll.frame(),
                                      ex=600 if poll.last else 20 * self._owner.lease)
            finally:
                poll.record.release()

    def _shut(self, poll, blank=''):
        """回调还没有完，开着的气泡先写完。"""
        with poll.lock:
            if not poll.open or poll.last:
                return
            poll.owed = bool(poll.url) and not poll.text.strip() and not poll.images
            poll.finish('…', blank)
        self._save(poll)

    def _grow(self, poll, text):
        poll.text = (poll.text + text)[:self.most + 1]
        poll.newer = True
        return True

    def _stream(self, parcel, func, stream):
        words = '\n\n（出错了）'
        self._grow(parcel, '\n\n' * bool(parcel.text))
        try:
            for piece in stream.pieces(self._under_way):
                self._grow(parcel, piece)
            words = ''
        finally:
            self._grow(parcel, words * bool(parcel.text.strip()))
        return True

    def _add(self, poll, message):
        kind, items = message['msgtype'], []
        if kind in ('template_card', 'update_template_card'):
            _need(kind == 'template_card' or poll.event == 'template_card_event',
                  '只有 template_card_event 能用更新卡片来答')
            _json_bytes(message)                # 写不成 JSON 的，现在就说
            poll.cards.append(message)
            return True
        if kind in ('text', 'stream'):          # 官方写法的 stream 也是文字和图片
            self._grow(poll, '\n\n' * bool(poll.text) + (message.body().get('content') or ''))
            items = message.body().get('msg_item') or []
        else:
            items = [self._picture(message) if kind == 'image' else None]
        with poll.lock:
            room = 0 if poll.event or poll.last else 10 - len(poll.images)
            poll.images += [item for item in items[:room] if item]
        if items[room:] or None in items:
            logger.warning('not sent to %s: %s，智能机器人的回调 URL 发不了：只有 JPG、PNG，一个气泡至多十张；填上 '
                           'bot_secret，用长连接', _show(poll.user), _show(kind))
        return True

    def _picture(self, message):
        """图片 → msg_item 里的一项；不是 JPG、PNG 的，太大的，没有文件的，是 None。收到的，先下载。"""
        handle = message.body().get('media_id')
        if isinstance(handle, str) and '://' in handle:
            import tempfile
            with tempfile.TemporaryDirectory() as folder:
                return self._picture(message.with_body(media_id=_bot_download(self._bot, handle, folder)))
        if not message.file():
            return None
        most = _MEDIA['image'][0]
        with _File(message.file()).open() as f:
            data = f.read(most + 1)
        if len(data) > most or not data.startswith((b'\xff\xd8', b'\x89PNG')):
            return None
        return {'msgtype': 'image', 'image': {'base64': binascii.b2a_base64(data, newline=False).decode(),
                                              'md5': hashlib.md5(data).hexdigest()}}

    def _over(self, poll):
        with poll.lock:
            some = poll.open or poll.text.strip() or poll.images
            if some and not poll.event and not poll.last:
                poll.finish(blank='（见下一条）' if poll.cards and poll.url else '')
            if poll.run.reply is None:
                poll.run.conclude(poll.last or _json_bytes(self._direct(poll)))
        if poll.open:
            self._save(poll)
        self._later(poll)

    def _direct(self, poll):
        """没有气泡的，直接答的 (dict)：更新的卡片，欢迎语，一张卡片；答了的不再算。"""
        if poll.event == 'enter_chat' and poll.text.strip():
            text, poll.sent, poll.head = next(_cuts(poll.text, 20480))
            return {'msgtype': 'text', 'text': {'content': text}}
        kind = {'': 'template_card', 'enter_chat': 'template_card', 'template_card_event': 'update_template_card'}.get(
            poll.event)
        card = next((card for card in poll.cards if card['msgtype'] == kind), {})
        if card:
            poll.cards.remove(card)
            if poll.event == 'template_card_event':
                return dict({k: v for k, v in card.items() if k != 'msgtype'}, response_type=kind)
        return card

    def _later(self, poll):
        """放不下的、太晚的：response_url，一条消息只有一次。"""
        rest = poll.text[poll.sent:]
        cards = [card for card in poll.cards if card['msgtype'] == 'template_card']
        if len(cards) < len(poll.cards):
            logger.error('too late: 更新卡片要在 %g 秒以内，没有更新', self._bot.event_within)
        if rest.strip():
            rest = poll.head + rest.lstrip('\n')
        else:
            rest = poll.closing if poll.owed and not cards else ''
        messages = [{'msgtype': 'markdown', 'markdown': {'content': text}} for text in _split_text(rest, 20480)] + cards
        if len(messages) > 1:
            logger.warning('not sent to %s: 回答太长，只有一次机会；填上 bot_secret，用长连接，就没有这个限制',
                           _show(poll.user))
        if messages:
            if poll.sent:                       # 前面的先到
                self._bot._sleep(self._bot.frame_every)
            self._respond(poll, messages[0])

    def _respond(self, poll, message):
        """从 response_url 送一条。它自己就是凭据，所以不进日志。"""
        code = poll.url.partition('=')[2] or poll.url
        try:
            _remember(code)
            parts = _split_url(poll.url)
            _need(parts.scheme == 'https' or _LOOPBACK.fullmatch(parts.hostname), 'response_url 不是 https')
            with fetch(poll.url, _json_bytes(message), {'Content-Type': 'application/json'}) as answer:
                status, answer = answer.status, json_to_dict(answer.read())
            if status != 200 or answer.get('errcode'):
                raise _refused(answer, 'response_url')
        except (ValueError, TypeError, RecursionError, WeChatError) as e:
            logger.error('not delivered to %s：消息 %s 的答复没有送到：%s', _show(poll.user), _show(poll.id),
                         _show(e, 400) if poll.url else '来不及直接答，又没有 response_url')
        finally:
            _secrets.discard(code)


# ---- 总成 WeChatServer ------------------------------------------------------------------------
# 配置决定运行什么：在 HTTP 上听应用的、智能机器人的回调，连智能机器人的长连接；几样都有，就都运行，回调是同一批。

def get_sender(appname: 'Union[str, Dict[str, str]]' = 'demo', ini_name: 'Optional[str]' = None,
               **settings: 'Union[None, str, int]') -> 'Union[WeChatClient, WeChatBot]':
    """配置里有的那条路，发消息用：应用 (corpid、secret、agentid) 是
    `WeChatClient`，否则有 bot_id 是 `WeChatBot`。

    参数同 `get_config`；缺了配置抛 `ConfigError`。一条路拒绝了，不会换另一
    条。
    """
    found = get_config(appname, ini_name, **settings)
    app = all(found[key] for key in ('corpid', 'secret', 'agentid'))
    return WeChatBot(found) if found['bot_id'] and not app else WeChatClient(found)


def _log_file(settings):
    """``[system] log_path`` 里的日志，1 MiB 一个，一共三个 → 它的 handler。"""
    from logging.handlers import RotatingFileHandler
    path = os.path.join(settings['log_path'], settings['log_name'] or 'easywechat.log')
    try:
        handler = RotatingFileHandler(path, maxBytes=1 << 20, backupCount=2, encoding='utf-8')
    except OSError as e:
        raise ConfigError('写不了日志 %s：%s；建好这个目录，或改 [system] 里的 log_path' % (path, e.strerror)) from None
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    return handler


def _log_to_file(settings):
    if settings['log_path'] and logging and all(isinstance(h, _OnStderr) for h in logger.handlers):
        logger.addHandler(_log_file(settings))


def _one_heap():
    """glibc 给每条线程一个堆，各有各的碎片；有 GIL，一个就够，少占几 MB。别的 libc 没有这回事。"""
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes
        ctypes.CDLL(None).mallopt(-8, 1)        # M_ARENA_MAX


class WeChatServer(Dispatcher):
    """自带 HTTP 服务器的 `Dispatcher`：``run()``，或 ``start()`` 和 ``stop()``。

        server = WeChatServer('demo')
        server.register_callback('text', lambda msg: msg)
        server.run(port=8000)

    ``appname``、``ini_name``、``needs`` 和设置同 `get_config`；回调 URL 缺少
    corpid、token 或 encoding_aes_key，抛 `ConfigError`。``store`` 放认领和
    token，几个进程时要大家都看得见的。``only_touser`` 为真，就只听 touser 里的
    人（``@all`` 是所有人），回调看不到别人的消息，他们得到一句 ``refusal``。

    没有 TLS：那是反向代理的事。时限和上限，在子类里改，或在开始服务以前给实
    例；单位是秒和字节；时限都是总数，走一个字节不会重新计时：

        answer_within = 4.5     # 一次投递等回调：企业微信等 5 秒。到时还没有结
                                # 果，能主动发送的回空的 200，有了再发
        hold_within = 6         # 不能主动发送的等到这时：企业微信先断开，再投
                                # 递，接着等；隔着代理也一样
        max_callbacks = 32      # 同时跑多少个回调，一个人的最多四分之一；轮不到
                                # 的由企业微信再投递
        max_body = 1 << 20      # 请求正文
        max_skew = 300          # 请求里的时间与本机最多差多少；0 是不检查
        lease = 3               # 「正在处理」的标记多久过期：活着的进程一直续，
                                # 死了的由下一次投递接手；`FileStore` 靠锁
        store_within = 1        # 等存储（`MemoryStore` 以外的）；再慢就当它坏
                                # 了，先用内存
        max_connections = 64    # 同时还在读的连接（描述符上限的四分之一以内）；
                                # 满了就关最旧的
        max_reading = 8 << 20   # 所有还没读完的正文，加起来
        max_line = 8 << 10      # 请求行
        max_head = 16 << 10     # 请求行和头部
        head_within = 5         # 读完头部
        request_within = 10     # 读完请求
        write_within = 5        # 写完回答
        stop_within = 5         # 停下时等正在回答的
    """

    max_connections: int = 64
    max_reading: int = 8 << 20
    max_line: int = 8 << 10
    max_head: int = 16 << 10
    head_within: float = 5
    request_within: float = 10
    write_within: float = 5
    stop_within: float = 5

    #: 智能机器人的气泡开着，回调却什么也没有给：用这句话写完它。
    bot_no_answer: str = '（没有回复）'

    _http: 'Any' = None
    _alarm: 'Any' = None
    _bot: 'Any'
    _polls: 'Any'
    _telling = False

    def __init__(self, appname: str = 'demo', ini_name: 'Optional[str]' = None, store: 'Any' = None,
                 needs: 'Who' = (), only_touser: bool = False, **settings: 'Union[None, str, int]') -> None:
        super().__init__(appname, ini_name, store, needs, only_touser, **settings)
        self._bot = WeChatBot(self.settings) if self.settings['bot_id'] else None
        self._chats = _BotReplies(self, self._bot) if self.settings['bot_id'] and self.settings['bot_secret'] else None
        self._polls = _PollReplies(self, self._bot) if '' in self._crypts else None
        self._roads += [road for road in (self._chats, self._polls) if road]
        self._seen: 'Set[str]' = set()

    def _receive_ids(self):
        """应用的是 corpid；智能机器人的回调 URL（没有 bot_secret）是空的。"""
        settings = self.settings
        bot, callback = settings['bot_id'], settings['token'] and settings['encoding_aes_key']
        if not bot or not callback and settings['corpid'] and not settings['bot_secret']:
            return super()._receive_ids()
        if not callback:
            _require(settings, 'bot_secret')
        return ([settings['corpid']] * bool(settings['corpid']) + [''] * (not settings['bot_secret'])) * bool(callback)

    @property
    def bot(self) -> 'WeChatBot':
        """同一份配置的 `WeChatBot`；没有 bot_id 抛 `ConfigError`。"""
        return self._bot or WeChatBot(self.settings)

    @property
    def connected(self) -> bool:
        """智能机器人的长连接通着 (bool)。"""
        return bool(self._bot) and self._bot.connected

    def send(self, message: 'Sendable', to: 'Who' = None, **fields: 'Any') -> 'Message':
        """发一条或几条消息，由配置里有的那条路：应用（corpid、secret、agentid），
        否则智能机器人。

        参数和返回的同 `WeChatClient.send`、`WeChatBot.send`：``party``、
        ``tag`` 等只有应用有。
        """
        sender = get_sender(self.settings)
        return (self.client if isinstance(sender, WeChatClient) else self.bot).send(message, to, **fields)

    def download(self, msg: 'Message', folder: 'Union[None, str, os.PathLike[str]]' = None) -> 'Path':
        """收到的图片、语音、视频、文件（mixed 的是 ``msg['MsgItems']`` 里的一项）
        → `pathlib.Path`，不管从哪条路来。

        ``folder``、文件名和大小同 `WeChatClient.download`。里面没有文件抛
        `ValueError`；过期、短了的抛 `WeChatError`。智能机器人的五分钟以内要下
        载。
        """
        handle = msg.get('MediaId')
        if not handle or not isinstance(handle, str):
            raise ValueError('%s 消息里没有文件' % msg.get('MsgType'))
        return self.bot.download(msg, folder) if '://' in handle else self.client.download(handle, folder)

    def _road_of(self, msg):
        return self._polls if getattr(msg, 'bot', False) else super()._road_of(msg)

    def _read(self, text, receive_id):
        msg = super()._read(text, receive_id)
        if receive_id:
            return msg
        msg = _bot_message(msg, self.settings['bot_name'])
        if msg['ToUserName'] != self.settings['bot_id']:
            raise CryptoError(
                ierror.WXBizMsgCrypt_ValidateCorpid_Error, 'receive id differs：aibotid 是 %s，这里是 %s' % (
                    _show(_mask(msg['ToUserName'])), _mask(self.settings['bot_id'])))
        return msg

    def deliver(self, msg: 'Message', answer: 'Callable[[Optional[bytes]], HTTPAnswer]',
                send: 'Callable[..., object]', spawn: 'Spawn' = None) -> None:
        """同 `Dispatcher.deliver`；智能机器人来问气泡长到哪里了，马上答。"""
        if getattr(msg, 'bot', False) and msg['MsgType'] == 'stream':
            send(*answer(self._polls.poll(msg)))
        else:
            if getattr(msg, 'bot', False):
                self._met(msg)
            super().deliver(msg, answer, send, spawn)

    def _met(self, msg):
        """一个人、一个群的第一条消息：它的 id 哪里也不显示，说一次怎样发给它。"""
        chat = msg['ChatId'] or msg['FromUserName']
        if self._telling and chat and chat not in self._seen and len(self._seen) < 1000:
            self._seen.add(chat)
            print('%s 来了第一条消息。发给%s：config.ini 里写 touser = %s，或命令行 --to %s' % (
                '一个群' if msg['ChatId'] else '一个人', '这个群' if msg['ChatId'] else '他', _show(chat), _show(chat)),
                file=sys.stderr, flush=True)

    def _connect(self):
        """连长连接；本机已经有一个在运行抛 `ConfigError`。"""
        session = self._bot._session
        session.heard, session.ready, session.users = self._chats.heard, self._chats.look, None
        guest = session.join()
        if guest:
            guest.close()
            raise ConfigError('这个机器人已经在本机运行（进程 %s）：一个 BotID 只能有一条长连接，停掉那一个'
                              % guest.pid)

    def start(self, host: str = '0.0.0.0', port: int = 8000) -> 'Optional[Tuple[str, int]]':
        """在后台线程里开始服务：听应用、智能机器人的回调，连智能机器人的长连接，
        配置里有什么就做什么。

        返回真正的 ``(host, port)``，端口 0 由系统挑；不听 HTTP 的是 None。
        ``host`` 也可以是 IPv6 的地址，``'::'`` 是两种都听。地址用不了抛
        `OSError`，已经在服务抛 `RuntimeError`，同一个智能机器人已经在本机运行
        抛 `ConfigError`。
        """
        _check_fork()
        if self._http and self._http.process == os.getpid() or self._bot and self._bot._session.running():
            raise RuntimeError('已经在服务了')
        _log_to_file(self.settings)
        if self._chats:
            self._connect()
        try:
            self._http = _HTTPServer(self, host, port) if self._crypts else None
        except BaseException as e:
            self.stop()
            if isinstance(e, (OSError, OverflowError)):
                raise _cannot_listen(e, host, port) from None
            raise
        return self._http and self._http.server_address[:2]

    def stop(self) -> None:
        """停止服务：不再接受，等正在回答、正在发送的，最多 ``stop_within`` 秒。
        WSGI 的进程结束以前也调用它。
        """
        deadline = time.monotonic() + self.stop_within
        server, self._http = self._http, None
        if server:
            server.close(deadline)
        if self._alarm and self._alarm[0] == os.getpid():
            with contextlib.suppress(OSError):
                self._alarm[1].send(b'.')
        self.finish(deadline - 0.7 * bool(self._chats))     # 还要写完开着的气泡，说再见
        for road in self._roads[1:]:
            road.close()
        if self._bot:
            self._bot._session.stop(max(0.4, deadline - time.monotonic()))

    def run(self, host: str = '0.0.0.0', port: int = 8000, debug: bool = False, threaded: bool = True) -> None:
        """服务到 `stop()`、SIGTERM 或 Ctrl-C 为止；在任何线程里都行（信号只在主线
        程里接）。

        ``debug`` 见 `debug` 属性；``threaded`` 只为旧程序保留，总是多线程。端
        口用不了，在主线程里说一句，退出码 2，在别的线程里抛 `OSError`。
        """
        self.debug, self._telling = bool(debug), True
        _one_heap()
        try:
            address = self.start(host, port)
        except OSError as e:
            if threading.current_thread() is not threading.main_thread():
                raise
            print('EasyWeChat %s' % e.strerror, file=sys.stderr)
            sys.exit(2)
        if address:
            host, port = address
            print('EasyWeChat 在监听 http://%s:%d/%s ，后台填 http://<公网地址>:%d/%s 。按 Ctrl-C 停止。' % (
                '[%s]' % host if ':' in host else host, port, self.route, port, self.route),
                file=sys.stderr, flush=True)
        if self._chats:
            print('EasyWeChat 在连接智能机器人。先跟它说一句话，它才能主动发给你。按 Ctrl-C 停止。',
                  file=sys.stderr, flush=True)
        self._wait()

    def _wait(self):
        """等到停下。信号处理函数只抛 KeyboardInterrupt：在里面做别的会死锁。"""
        before, fd = {}, None
        rest, alarm = socket.socketpair()   # 睡下以前一刹那到的信号叫不醒谁：所以每个信号都在 alarm 里写一个字节
        alarm.setblocking(False)
        try:
            self._alarm = os.getpid(), alarm
            up = bool(self._http or self._bot and self._bot._session.running())
            if up and threading.current_thread() is threading.main_thread():
                fd = signal.set_wakeup_fd(alarm.fileno())
                for number in signal.SIGTERM, signal.SIGINT:
                    before[number] = signal.signal(number, signal.default_int_handler)
            while up:
                woken = set(rest.recv(64))
                up = not woken & {*before, ord('.')}        # 抛在一个 __del__ 里的异常没有了，它的字节还在
        except KeyboardInterrupt:
            pass
        finally:
            for number in before:           # 再来一个也不打断：停下本来就有时限
                signal.signal(number, signal.SIG_IGN)
            if fd is not None:
                signal.set_wakeup_fd(fd)
            self._alarm = None
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
            rest.close()
            alarm.close()


# ---- 命令行 Command line ----------------------------------------------------------------------
# stdout 只有结果；出错是 stderr 上的一行 `easywechat: …`。
# 退出码：0 成了，1 被拒绝，2 用法或配置，3 网络，130 被打断。

#: 公开的演示凭据：没有 config.ini 时 --echo 和 --probe 用它，只在本机。
_DEMO = {'corpid': 'wwEasyWeChatDemo00', 'token': 'EasyWeChatDemo', 'agentid': '1000002',
         'encoding_aes_key': 'EasyWeChatDemoKeyIsPublicDoNotUseItAnywhere'}


class _CommandError(Exception):
    """命令行的一次失败：``args`` 是（退出码，一句话）。"""


#: 命令行的出错，是一句话，不是 traceback。
_FAULTS = WeChatError, ImportError, OSError


def _sentence(error):
    """一个错误 → 给人看的 (str)。"""
    if isinstance(error, OSError):
        what = {errno.ENOENT: '没有这个文件', errno.EISDIR: '这是一个目录，不是文件', errno.EACCES: '没有权限',
                errno.ENOSPC: '磁盘满了'}.get(error.errno, error.strerror or str(error))
        return '%s：%s' % (error.filename, what) if error.filename else what
    return str(error) if isinstance(error, APIError) else getattr(error, 'errmsg', str(error))


def _echo(msg):
    """--echo 的回调：能原样返回的原样返回，别的列出字段。"""
    if msg.get('MsgType') in ('text', 'image', 'voice', 'video'):
        return msg
    return '\n'.join('%s: %s' % item for item in msg.items())


_PATIENCE = 5  #: 企业微信等回调的秒数。


def _visit(url, query, body=None):
    """像企业微信那样发一个请求，一共等 5 秒 → 正文 (bytes)。直连，不走代理，不跟随重定向。"""
    parts = _split_url(url)
    url = '%s://%s%s' % (parts.scheme, parts.netloc, parts.path or '/')
    asked = url + '?' + urllib.parse.urlencode(query)
    try:
        with fetch(asked, body, {'Content-Type': 'text/xml'}, _PATIENCE, proxies={}) as answer:
            status, body = answer.status, answer.read() if answer.status == 200 else b''
    except NetworkError as e:
        port = ['--port', str(parts.port)] if parts.port not in (None, 8000) else []
        then = '机器人没有在运行，或端口不对：先执行 ' + _command('--echo', *port) if 'refused' in e.errmsg else \
            '机器人没有答完：回调太慢了，或那里不是机器人' if e.errcode == 504 else e.hint
        raise _CommandError(3, '%s（%s）' % (then, e.errmsg)) from None
    if status != 200:
        raise _CommandError(1, '%s 返回 %d：%s' % (url, status, {
            403: 'Token、EncodingAESKey、corpid 或时钟不一致，看机器人的日志里是哪一个',
            404: '路径不一致，看 route_name'}.get(status, '那里是不是 EasyWeChat？')))
    return body


def _signed(crypt, text):
    """→（查询参数，密文 str）：像企业微信那样加密、签名。"""
    encrypt, timestamp = crypt.seal(text), str(int(time.time()))
    nonce = str(struct.unpack('>I', os.urandom(4))[0])
    signature = crypt.sign(timestamp, nonce, encrypt)
    return {'msg_signature': signature, 'timestamp': timestamp, 'nonce': nonce}, encrypt.decode()


def _probe(url, settings, text):
    """扮演企业微信：先 GET 校验，再投递一条文本 →（收到的消息 XML，回复的 dict，没有回复是 {}）。"""
    crypt = WXBizMsgCrypt(settings['token'], settings['encoding_aes_key'], settings['corpid'])
    echo = str(struct.unpack('>Q', os.urandom(8))[0])
    query, encrypt = _signed(crypt, echo)
    if _visit(url, dict(query, echostr=encrypt)) != echo.encode():
        raise _CommandError(1, '%s 返回的不是 echostr：那里是不是 EasyWeChat？' % url)
    message = dict_to_xml({'ToUserName': settings['corpid'], 'FromUserName': 'probe', 'CreateTime': int(time.time()),
        'MsgType': 'text', 'Content': text, 'AgentID': settings['agentid'],
        'MsgId': struct.unpack('>Q', os.urandom(8))[0] >> 1})
    query, encrypt = _signed(crypt, message)
    body = dict_to_xml({'ToUserName': settings['corpid'], 'Encrypt': encrypt, 'AgentID': settings['agentid']})
    answer = _visit(url, query, body.encode('utf-8'))
    if answer in (b'', b'success'):
        return message, {}
    try:
        envelope = xml_to_dict(answer)
        signed = (envelope.get(name) for name in ('MsgSignature', 'TimeStamp', 'Nonce'))
        return message, xml_to_dict(crypt.decrypt_message(answer, *signed))
    except WeChatError as e:
        raise _CommandError(1, '%s 返回的不是回复：%s' % (url, e.errmsg)) from None


def _settings_or_demo(args):
    """→ 关键字参数：什么配置都没有，就用演示凭据；否则是空的。"""
    names = ['EASYWECHAT_CONFIG'] + ['EASYWECHAT_' + key.upper() for key in _APP_KEYS]
    given = args.config or any(map(os.environ.get, names)) or _find_config(None)[0]
    return {} if given else _DEMO


def _run_echo(args):
    demo = _settings_or_demo(args)
    host = args.host or ('127.0.0.1' if demo else '0.0.0.0')
    if demo and not _LOOPBACK.fullmatch(host):
        raise _CommandError(
            2, '没有 config.ini，只能在本机服务；写一个：' + _command('--init'))
    server = WeChatServer(args.app, args.config, **demo)
    server.register_callback('*', _echo)
    server.debug, server._telling = args.debug, True
    _one_heap()
    address = server.start(host, args.port)
    if server._chats:
        print('智能机器人%s。按 Ctrl-C 停止。' % ('连上了，跟它说一句话试试' if server.bot._session.wait(10) else
                                       '还没有连上，一直在试'), flush=True)
    if not address:
        return server._wait()
    host, port = address
    url = 'http://%s:%d/%s' % ('[%s]' % host if ':' in host else host, port, server.route)
    if demo:
        print('没有 config.ini：用公开的演示凭据 (easywechat._DEMO)，只在本机。')
        message, reply = _probe(url, server.settings, '你好，EasyWeChat')
        print('▶ 发去（加密前）：%s\n◀ 收到（解密后）：%s' % (message, dict_to_xml(reply)))
        print('在另一个终端试试：' + _command('--probe', '你好', *(['--url', url] if port != 8000 else [])))
    else:
        print('后台「接收消息 → 设置API接收」的 URL：http://<公网地址>:%d/%s' % (port, server.route))
    print('在监听 %s ，按 Ctrl-C 停止。' % url, flush=True)
    return server._wait()


def _run_probe(args):
    demo = _settings_or_demo(args)
    settings = get_config(args.app, args.config, **demo)
    if settings['bot_id'] and not settings['corpid']:
        raise _CommandError(2, '--probe 扮演的是应用的回调；智能机器人，跟它说一句话，或用 examples/simulator.py 试')
    app = Dispatcher(settings)
    url = args.url or 'http://127.0.0.1:%d/%s' % (args.port, app.route)
    if demo and not _LOOPBACK.fullmatch(_split_url(url).hostname):
        raise _CommandError(2, '没有 config.ini，只能试本机的；写一个：' + _command('--init'))
    reply = _probe(url, app.settings, _decoded(args.probe))[1]
    if not reply:
        print('easywechat: （没有回复）', file=sys.stderr)
    elif reply.get('MsgType') == 'text':
        print(reply.get('Content', ''))
    else:
        print(dict_to_xml(reply))


def _run_init(args):
    import random
    path = os.path.abspath(args.config or 'config.ini')
    letters = _BASE64[:-2].decode()         # 没有 + 和 /
    token, key = (''.join(random.SystemRandom().choices(letters, k=length)) for length in (32, 43))
    text = _CONFIG_TEMPLATE.format(corpid='', token=token, encoding_aes_key=key)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as f:
            f.write(text.encode('utf-8'))
    except FileExistsError:
        raise _CommandError(2, '%s 已经有了，没有动它；要新的就先改它的名字，或 --config 另一个文件' % path) from None
    except OSError as e:
        raise _CommandError(2, '写不了 %s：%s' % (path, e.strerror)) from None
    print(path)
    print('easywechat: 填上其中的 corpid，再把 Token 和 EncodingAESKey 抄到管理后台；智能机器人只要填 bot_id 和 '
          'bot_secret。', file=sys.stderr)


def _sender(args):
    if args.robot and (args.party or args.tag):
        raise _CommandError(2, '--party 和 --tag 不能和 --robot 一起用')
    sender = WeChatRobot(None, args.app, args.config) if args.robot else get_sender(args.app, args.config)
    if isinstance(sender, WeChatBot) and (args.party or args.tag):
        raise _CommandError(2, '智能机器人只能发给人和群：--to userid 或 chatid，没有 --party 和 --tag')
    sender.retry_within = args.retry
    if sys.stderr.isatty():
        sender.progress = lambda sent, total: print('\r%d%%' % (100 * sent // total), file=sys.stderr, flush=True,
                                                    end='\n' if sent >= total else '')
    return sender


def _read_stdin():
    """标准输入的文字 (str)；不是文字的，一个字也不发。"""
    data = sys.stdin.buffer.read(_XML_SIZE + 1)
    if len(data) > _XML_SIZE:
        raise _CommandError(2, '标准输入超过 1 MiB：用 --send-file 发文件')
    try:
        text = _text_of(data)
    except UnicodeError:
        raise _CommandError(2, '标准输入不是 UTF-8、UTF-16、GB18030 的文字，没有发') from None
    odd = re.search('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]', text)
    if odd:
        raise _CommandError(2, '标准输入里有控制字符 (\\x%02x)，没有发：关掉颜色、进度条；不是文字的用 --send-file'
                            % ord(odd.group()))
    return text.strip('\r\n')


def _run_send(args):
    if args.send_file is not None:
        import pathlib
        message = pathlib.Path(args.send_file)
    elif args.send == '-':
        message = _read_stdin()
        if not message:         # cron：没有输出就没有消息
            return
    else:
        message = _decoded(args.send)
        if args.rest and not args.markdown:
            message = plain_text(message)
        if not message.strip():
            raise _CommandError(2, '没有要发的文字：写在 --send 后面，或用 --send - 从标准输入读')
    if args.markdown and args.send_file is not None:
        raise _CommandError(2, '--markdown 是文字的，不能和 --send-file 一起用')
    if args.markdown:
        message = {'msgtype': 'markdown', 'markdown': {'content': message}}
    sender = _sender(args)
    sender.send(message, args.to, *([args.party, args.tag] if isinstance(sender, WeChatClient) else []))


def _read_mail(line_of, folder):
    """→ [一条文本，附件 (Path)…]；附件写在 ``folder`` 里，太大、太小的只在文本里说。"""
    import pathlib
    top, texts, files, notes = None, [], [], []
    for n, (headers, path) in enumerate(_mail_parts(line_of, folder)):
        top = headers if top is None else top
        kind = re.sub('multipart/.*', 'text/plain', headers.get_content_type())     # 没有边界的
        name = _words(headers.get_filename() or '')
        if path is None or kind in _USELESS:
            continue
        if kind in ('text/plain', 'text/html') and not name and headers.get_content_disposition() != 'attachment':
            with open(path, 'rb') as f:
                text = _in_charset(f.read(1 << 20), headers.get_content_charset())
            texts.append((kind, text.replace('\r\n', '\n')))
            continue
        name = _file_name(name or {'message/rfc822': 'mail.eml', 'text/calendar': 'invite.ics'}.get(kind, ''), kind)
        os.mkdir(os.path.join(folder, 'file%d' % n))
        file = pathlib.Path(folder, 'file%d' % n, name)
        os.replace(path, str(file))
        try:
            _media_kind(_File(file))
            files.append(file)
        except APIError as e:
            notes.append('（附件没有发：%s）' % e.errmsg)
    return [_mail_text(top, texts, notes)] + files


def _send_mail(args):
    import tempfile
    stdin, dots = sys.stdin.buffer, args.dots

    def line_of():
        line = stdin.readline(1 << 16)
        return b'' if dots and line.rstrip(b'\r\n') == b'.' else line
    with tempfile.TemporaryDirectory() as folder:
        first = line_of()
        if not first:           # cron：没有输出就没有信
            return
        items = _read_mail(iter(itertools.chain([first], iter(line_of, None))).__next__, folder)
        _sender(args).send(items, args.to)


def _run_mail(args):
    """退出码是 sysexits.h 的：69 被拒绝，75 过一会儿再来，78 配置。"""
    try:
        _send_mail(args)
    except _FAULTS as e:
        busy = isinstance(e, NetworkError) or getattr(e, 'errcode', 0) in (-1, 45009, 45033)
        code = 75 if busy else 69 if isinstance(e, (APIError, CryptoError)) else 78
        raise _CommandError(code, _sentence(e)) from None


def _run_version(args):
    with open(_FILE, 'rb') as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    print('EasyWeChat %s, %s\nSHA-256 %s' % (__version__, __date__, digest))


def _run_explain(args):
    for code in args.explain:
        if not _advice(code, ''):
            raise _CommandError(1, '没有收录 %d：到企业微信开发者文档的「全局错误码」里查' % code)
        print('%d %s' % (code, _advice(code, '')))


#: 键 →（该是什么样，一句话，在后台的哪一页）。
_SHAPES = {
    'corpid': ('w[wx][0-9A-Za-z]{16}', '应以 ww 开头，18 个字符', '我的企业 → 企业信息'),
    'agentid': (_AGENT.pattern, '应该是一个数字', '应用管理 → 自建 → 应用'),
    'secret': ('[0-9A-Za-z_-]{43}', '应该是 43 个字符', '应用管理 → 自建 → 应用'),
    'token': ('[0-9A-Za-z]{1,32}', '应该是至多 32 个字母和数字', '应用 → 接收消息 → 设置API接收'),
    'encoding_aes_key': ('[0-9A-Za-z]{43}', '应该恰好是 43 个字母和数字', '应用 → 接收消息 → 设置API接收'),
    'touser': (r'@all|[0-9A-Za-z][0-9A-Za-z_@.|-]*', '应该是「账号」，不是姓名', '通讯录 → 成员'),
    'bot_id': ('[!-~]+', '不应有空白、全角', '智能机器人 → API 模式 → 长连接'),
    'bot_secret': ('[!-~]+', '不应有空白、全角', '智能机器人 → API 模式 → 长连接'),
    'robot': (r'[0-9a-f-]{36}|https?://\S+[?&]key=[0-9A-Za-z_-]+\S*', '应该是 Webhook 地址，或其中的 key',
              '群 → 消息推送'),
}


def _check_files(settings):
    """读了的文件的权限。"""
    for source in sorted(set(settings.sources.values()) - {''}):
        path = source.rpartition(' [')[0]
        mode = os.stat(path).st_mode & 0o777 if path and os.name == 'posix' else 0
        if mode & 0o007 and not _keeps_modes(os.path.dirname(path)):
            yield None, '%s 在不记权限的文件系统上，谁都能读' % path
        elif mode & 0o007:
            yield False, '%s 别人也能读：chmod o= %s' % (path, path)
        elif mode & 0o070:
            yield True, '%s 同组的也能读 (0%o)，别人不能' % (path, mode)


def _check_shapes(settings, bad):
    """每个键 →（好不好，None 是用不着就算了，一句话）（生成器）；不好的记在 ``bad`` 里。"""
    for key, (form, rule, page) in _SHAPES.items():
        value = settings[key]
        if not value:
            wanted = key == 'corpid' and not settings['robot'] and not settings['bot_id']
            bad.update([key] * wanted)
            yield False if wanted else None, '%s 没有写（「%s」）' % (key, page)
        elif re.fullmatch(form, value):
            yield True, '%s，来自 %s' % (key, settings.sources[key])
        else:
            bad.add(key)
            odd = '（含空白、全角或不可见字符）' if re.search('[^!-~]', value) else ''
            yield False, '%s（来自 %s）格式不对%s：%s，现在有 %d 个字符；到「%s」重新复制' % (
                key, settings.sources[key], odd, rule, len(value), page)


def _check_settings(settings):
    """设置的每一样 →（好不好，None 是用不着就算了，一句话）（生成器）。"""
    bad = set()
    yield from _check_shapes(settings, bad)
    yield from _check_files(settings)
    for text in settings.unknown:
        yield False, text
    for keys, use in (('corpid token encoding_aes_key bot_id', WeChatServer), ('corpid secret', WeChatClient),
                      ('robot', functools.partial(WeChatRobot, None)),
                      ('log_path', lambda settings: _log_file(settings).close())):
        try:
            if any(settings[key] for key in keys.split() if key != 'corpid') and not bad & set(keys.split()):
                use(settings)
        except ImportError:
            yield None, _AES_INSTALL
        except WeChatError as e:        # 收消息、发消息的时候会拒绝的，现在就说
            if e.errmsg not in bad:
                yield False, e.errmsg
            bad.add(e.errmsg)
    if settings['bot_secret'] and settings['bot_secret'] == settings['secret']:
        yield False, 'bot_secret 和 secret 一样：智能机器人的不是应用的，到「智能机器人 → API 模式 → 长连接」里复制'
    if settings['secret'] and not settings['agentid']:
        yield False, '有 secret，没有 agentid：发消息两样都要，「应用管理 → 自建 → 应用」里一起复制'


def _check_dns(host):
    """`urlsplit` 的结果 → 查得到没有；有代理就不用查。"""
    if any(name.lower() in ('https_proxy', 'http_proxy', 'all_proxy') for name in os.environ):
        return True
    try:
        found = socket.getaddrinfo(host.hostname, host.port or 443, 0, socket.SOCK_STREAM)
        yield True, 'DNS：%s 是 %s' % (host.hostname, found[0][4][0])
        return True
    except OSError as e:
        yield False, 'DNS 查不到 %s (%s)：看网络，或配置里的地址' % (host.hostname, e)
        return False


def _check_bot(bot):
    """智能机器人的长连接，一步一步 →（好不好，一句话）（生成器）。本机有一个在运行，就只问它。"""
    host = urllib.parse.urlsplit(bot.url)
    guest = _meet(bot)
    if guest:
        guest.close()
        good = guest.stage == 'ready'
        yield good, '智能机器人在运行（进程 %s），长连接%s' % (guest.pid, '通着' if good else '断着：看它的日志')
        return
    if not (yield from _check_dns(host)):
        return
    try:
        line = _WebSocket(bot.url, bot.settings['ca_file'], bot.connect_within)
        yield True, '连上了 %s%s' % (host.netloc, '，证书有效' * (host.scheme == 'wss'))
        try:
            _Session(bot).subscribe(line)
            yield True, 'bot_id 和 bot_secret 正确 (aibot_subscribe)'
            yield None, '别的机器上要是有同一个机器人在运行，刚才断开了，一分钟左右会自己连上'
        finally:
            line.close()
    except APIError as e:
        yield False, str(e)
    except _FAILURES as e:
        yield False, str(bot._failed(e))


def _check_network(client):
    """从 DNS 到可信 IP，一步一步 →（好不好，一句话）（生成器）；前一步不通就停。"""
    import email.utils
    host = urllib.parse.urlsplit(client.api_base)
    if not (yield from _check_dns(host)):
        return
    try:
        date = _Call(client, 'gettoken', {}, read=lambda _, answer: {'date': answer.headers.get('Date')}).run()['date']
        yield True, '连上了 %s%s' % (host.netloc, '，证书有效' * (host.scheme == 'https'))
        with contextlib.suppress(TypeError, ValueError):
            ahead = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
            yield abs(ahead) < 60, '时钟与企业微信差 %.0f 秒%s' % (ahead, '' if abs(ahead) < 60 else '：校时 (NTP)')
        client._new_token()
        yield True, 'corpid 和 secret 正确 (gettoken)'
        if client.settings['agentid']:
            agent = client.call('agent/get', agentid=client.settings['agentid'])
            yield True, '应用「%s」可以调用，出口 IP 可信' % _show(agent.get('name', ''))
    except APIError as e:
        yield False, str(e)


def _run_check(args):
    settings = get_config(args.app, args.config)
    findings = _check_settings(settings)
    for make, check in (WeChatClient, _check_network), (WeChatBot, _check_bot):
        with contextlib.suppress(ConfigError):      # _check_settings 会说
            if make is WeChatClient or settings['bot_secret']:
                findings = itertools.chain(findings, check(make(settings)))
    bad = 0
    for good, text in findings:
        print('%s %s' % ({True: '✓', False: '✗', None: '–'}[good], text), flush=True)
        bad += good is False
    if bad:
        raise _CommandError(1, '有 %d 处要改，见上面的 ✗' % bad)


#: argparse 的错误 → 一句话。
_USAGE = (('one of the arguments', '没有写要做什么，例如 --echo、--send'),
          (r'argument (\S+): expected', r'\1 后面少了一个值'), (r'argument (\S+): invalid', r'\1 后面应该是数字'),
          (r'argument (\S+): not allowed with argument (\S+)', r'\1 和 \2 不能一起用'),
          (r'ambiguous option: (\S+)', r'\1 不止一个意思，写完整'), ('unrecognized arguments: (.*)', r'不认得 \1'))


def _misused(message):
    """命令行写错了：说一句，怎样看有哪些。"""
    for form, sentence in _USAGE:
        message = re.sub('^%s.*' % form, sentence, message, flags=re.S)
    raise _CommandError(2, '%s；有哪些：%s' % (message, _command('--help')))


def _parser():
    from argparse import ArgumentParser
    parser = ArgumentParser(prog='easywechat.py', usage='python easywechat.py 做什么 [选项]', add_help=False,
                            description='企业微信机器人，一个 Python 文件。做什么是选项里到 --help 为止的一个。')
    parser.error, parser._optionals.title = _misused, '选项'
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--echo', action='store_const', dest='run', const=_run_echo, help='启动一个原样回话的机器人')
    what.add_argument('--probe', metavar='TEXT', nargs='?', const='', help='扮演企业微信：校验、投递 TEXT、打印回复')
    what.add_argument('--send', metavar='TEXT', nargs='?', const='',
                      help="发一条文本；- 是从标准输入读，空的就不发。要换行：printf '一\\n二' | … --send -。"
                      '别人起的名字要写在 -- 后面：--send -- TEXT …')
    what.add_argument('--send-file', metavar='PATH', nargs='?', const='', help='发一个文件（图片、语音、视频按后缀）')
    what.add_argument('--explain', metavar='CODE', nargs='+', type=int, help='一个错误码是什么意思，怎么办')
    for name, run, text in (('--mail', _run_mail, '把标准输入的一封信 (RFC 5322) 发出去；叫 sendmail 的链接也是这个'),
                            ('--check', _run_check, '配置和网络哪里不对，到哪里改'),
                            ('--init', _run_init, '写一个 config.ini，其中有新的 Token 和 EncodingAESKey'),
                            ('--version', _run_version, '打印版本、日期和这个文件的 SHA-256')):
        what.add_argument(name, action='store_const', dest='run', const=run, help=text)
    what.add_argument('-h', '--help', action='help', help='打印这段说明')
    parser.add_argument('--host', help='监听的地址（默认 0.0.0.0；没有 config.ini 时 127.0.0.1）')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    parser.add_argument('--app', default='demo', help='config.ini 里的节名（默认 demo）')
    parser.add_argument('--config', metavar='FILE', help='config.ini 的路径')
    parser.add_argument('--url', help='--probe 的目标（默认本机）')
    parser.add_argument('--to', metavar='USER', help='发给谁，几个用 | 隔开（默认配置里的 touser）；--robot 时是 @ 谁')
    for name, text in ('--party', '部门'), ('--tag', '标签'):
        parser.add_argument(name, help='发给哪些%s，几个用 | 隔开' % text)
    parser.add_argument('--markdown', action='store_true', help='TEXT 是 markdown')
    parser.add_argument('--robot', action='store_true', help='用群机器人发；key 在配置的 robot 里')
    parser.add_argument('--retry', metavar='SECONDS', type=float, default=0, help='连不上时一直试到这么多秒')
    parser.add_argument('--dots', action='store_true', help='--mail：只有一个点的一行是信的结尾')
    parser.add_argument('--debug', action='store_true', help='回调出错时把原因回给用户')
    return parser


_TEXTS = '--send', '--send-file', '--probe'        #: 后面是一段文字的选项。


def _arguments(argv):
    """``--`` 后面的都是文字，用空格连起来，里面没有选项：它可能是一个种子、一块硬盘的名字，是别人起的。"""
    end = argv.index('--') if '--' in argv else len(argv)
    words = []
    for word in argv[:end]:             # '-18℃' 也是文字：不像选项的，argparse 不用猜
        if words and words[-1] in _TEXTS and word[:1] == '-' and not re.fullmatch('-|-h|--[a-z][a-z-]*(=.*)?', word):
            words[-1] += '=' + word
        else:
            words.append(word)
    parser = _parser()
    for word in words:
        known, name = parser._option_string_actions, word.partition('=')[0]
        if word[:2] == '--' and not any(option.startswith(name) for option in known):
            import difflib
            close = difflib.get_close_matches(name, known, 1)
            parser.error('没有 %s 这个选项%s' % (name, '，是不是 %s' % close[0] if close else ''))
    args = parser.parse_args(words)
    args.rest = argv[end + 1:]
    for name in ('send', 'send_file', 'probe') if end < len(argv) else ():
        if getattr(args, name) == '':
            setattr(args, name, ' '.join(args.rest))
            return args
    if end < len(argv):
        raise _CommandError(2, '-- 写在 %s 后面，再后面是文字' % '、'.join(_TEXTS))
    if not 0 <= args.port <= 65535:
        raise _CommandError(2, '没有 %d 这个端口：0 到 65535' % args.port)
    if not 0 <= args.retry < float('inf'):
        raise _CommandError(2, '--retry 后面应该是秒数，例如 600')
    return args


def _sendmail(words):
    """以 sendmail 的名字运行，cron、smartd、mdadm 的选项 → --mail 的。收件人都不看：发给配置里的 touser。"""
    for word in words:
        if re.match('-b[^m]|-q', word):
            raise _CommandError(64, '这个 sendmail 只会把标准输入的一封信发到企业微信，没有 %s' % word)
    return ['--mail'] + ['--dots'] * (not {'-i', '-oi'} & set(words))


def _spoken(job, name, faults):
    """跑 ``job()`` → 退出码；出了错，在 stderr 上说一句。"""
    try:
        return job() or 0
    except _CommandError as e:
        code, text = e.args
    except faults as e:
        code = 3 if isinstance(e, NetworkError) else 1 if isinstance(e, (APIError, CryptoError)) else 2
        text = _sentence(e)
    except KeyboardInterrupt:
        code, text = 130, '被打断了'
    print('%s: %s' % (name, '\n'.join(_escape(line) for line in _redact(text).splitlines())), file=sys.stderr)
    return code


def command(run: 'Callable[[], Optional[int]]') -> 'NoReturn':
    """一个程序的最后一行：跑 ``run()``，以它返回的退出码结束；None 是 0。

        if __name__ == '__main__':
            easywechat.command(main)

    本文件的错误、缺一个包、读写不了文件，在 stderr 上说一句，不是 traceback；
    退出码同命令行：1 企业微信拒绝了，2 用法或配置不对，3 网络不通，130 被打
    断。显示不了中文的终端，stdout 上是转义。别的异常照样抛出去。
    """
    with contextlib.suppress(AttributeError, OSError):      # reconfigure 要 Python 3.7
        sys.stdout = open(sys.stdout.fileno(), 'w', 1, sys.stdout.encoding, 'backslashreplace', closefd=False)
    sys.exit(_spoken(run, os.path.splitext(os.path.basename(sys.argv[0]))[0], _FAULTS))


def main(argv: 'Optional[Sequence[str]]' = None) -> int:
    """命令行；返回退出码 (int)。"""
    def job():
        words = list(sys.argv[1:] if argv is None else argv)
        if argv is None and os.path.basename(sys.argv[0]) == 'sendmail':
            words = _sendmail(words)
        args = _arguments(words)
        try:
            (args.run or (_run_explain if args.explain else _run_send if args.probe is None else _run_probe))(args)
        except BrokenPipeError:             # | head：没有人看了
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _spoken(job, 'easywechat', _FAULTS + (TypeError, ValueError))


if __name__ == '__main__':
    sys.modules.setdefault('easywechat', sys.modules[__name__])
    command(main)
