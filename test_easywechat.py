#!/usr/bin/env python3
"""easywechat.py 的测试：标准库和 pycryptodome，没有网络，端口由系统挑。节与被测的文件一样，顺序也一样。

一张请求的表走三扇门：`handle`、`wsgiref.validate` 里的 WSGI、真的套接字。
"""

import ast
import binascii
import collections
import contextlib
import doctest
import errno
import functools
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import unittest
import urllib.parse
import warnings
import wsgiref.validate

import easywechat
from easywechat import (APIError, ConfigError, CryptoError, FileStore, FormatException, MemoryStore,
                        NetworkError, Stream, WeChatClient, WeChatError, WeChatRobot, WeChatServer,
                        WXBizMsgCrypt, dict_to_xml, get_config, ierror, xml_to_dict)

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, 'examples'))

import simulator  # noqa: E402

SOURCE = os.path.join(HERE, 'easywechat.py')
PLANTED = 'plantedS3cret'
SETTINGS = {'corpid': 'wwtest0123456789ab', 'token': 'plantedToken7Zq',
            'encoding_aes_key': 'plantedKey0123456789abcdefghijklmnopqrstuvG', 'agentid': '1000002'}
CRYPT = WXBizMsgCrypt(SETTINGS['token'], SETTINGS['encoding_aes_key'], SETTINGS['corpid'])
LOG = io.StringIO()                     # 整个测试里打印、写过的日志和异常；最后在里面找密钥
CASES = {'text': {'Content': '状态'}, 'image': {'PicUrl': 'https://e.x/p.jpg', 'MediaId': 'M'},
         'voice': {'MediaId': 'M', 'Format': 'amr'}, 'video': {'MediaId': 'M', 'ThumbMediaId': 'T'}}
IDS = iter(range(1, 10 ** 9))
NOW = int(time.time())                  # 消息的 CreateTime
SECRETS = {SETTINGS['token'], SETTINGS['encoding_aes_key'], PLANTED}    # 哪里都不许出现的


def setUpModule():
    """仓库里可能有填好的 config.ini：不许读它，更不许给里面的人发消息。"""
    setUpModule.folder = tempfile.TemporaryDirectory()
    os.chdir(setUpModule.folder.name)
    easywechat.__file__ = sys.modules['__main__'].__file__ = os.path.join(os.getcwd(), 'easywechat.py')


def tearDownModule():
    os.chdir(HERE)
    setUpModule.folder.cleanup()


def message(**fields):
    """一条消息的 XML；没写的字段用常见的值，MsgId 每次不同。"""
    full = {'ToUserName': SETTINGS['corpid'], 'FromUserName': 'li.lei', 'CreateTime': NOW,
            'MsgType': 'text', 'AgentID': 1000002, 'MsgId': str(next(IDS))}
    full.update(fields)
    return dict_to_xml({k: v for k, v in full.items() if v is not None})


def signed(encrypt, nonce='1372623149', timestamp=None):
    timestamp = str(timestamp or int(time.time()))
    return collections.OrderedDict([('msg_signature', CRYPT.sign(timestamp, nonce, encrypt)),
                                    ('timestamp', timestamp), ('nonce', nonce)])


def delivery(xml, **kwargs):
    """企业微信的一次投递：（方法，目标，正文）。"""
    encrypt = CRYPT.seal(xml)
    body = dict_to_xml({'ToUserName': SETTINGS['corpid'], 'Encrypt': encrypt.decode(),
                        'AgentID': '1000002'}).encode()
    return 'POST', '/weixin?' + urllib.parse.urlencode(signed(encrypt, **kwargs)), body


def opened(answer):
    """回复的信封 (bytes) → 里面的 dict；空的是 None。"""
    if not answer:
        return None
    envelope = xml_to_dict(answer)
    return xml_to_dict(CRYPT.decrypt_message(answer, envelope['MsgSignature'],
                                             envelope['TimeStamp'], envelope['Nonce']))


def make_server(callback=None, cls=WeChatServer, **settings):
    server = cls('test', **dict(SETTINGS, **settings))
    if callback:
        server.register_callback('*', callback)
    return server


def run_cli(*args, stdin=b'', **kwargs):
    """在空目录里运行命令行 →（退出码，stdout, stderr）。给了 LC_ALL 就在新的进程里，否则在这个进程里。"""
    with tempfile.TemporaryDirectory() as folder:
        source = shutil.copy(SOURCE, folder)
        env = dict(os.environ, XDG_CACHE_HOME=folder, **kwargs)
        for name in list(env):
            if name.startswith('EASYWECHAT_') and name not in kwargs:
                del env[name]
        if 'LC_ALL' in kwargs:
            done = subprocess.run([sys.executable, source] + [a.encode() for a in args], cwd=folder,
                                  env=env, input=stdin, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=20)
            result = done.returncode, done.stdout.decode(), done.stderr.decode()
        else:
            out, err = io.StringIO(), io.StringIO()
            with environment(**env), working_in(folder), contextlib.redirect_stdout(out), \
                    contextlib.redirect_stderr(err), swapped(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin))):
                try:
                    code = easywechat.main(list(args))
                except SystemExit as e:     # argparse
                    code = e.code
            result = code, out.getvalue(), err.getvalue()
        LOG.write(result[1] + result[2])
        return result


@contextlib.contextmanager
def swapped(owner, name, value):
    """换掉一个接缝（时钟、随机数），用完换回。"""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def environment(**variables):
    """环境变量；没有列出的 EASYWECHAT_* 都不在。"""
    before = dict(os.environ)
    for name in before:
        if name.startswith('EASYWECHAT_'):
            del os.environ[name]
    try:
        os.environ.update((k, os.fsdecode(v.encode('utf-8', 'surrogateescape'))) for k, v in variables.items())
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def working_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def raises(kind):
    """像 assertRaises，并且把异常的每一面 (str、repr、traceback、cause、context) 写进 LOG。"""
    caught = []
    try:
        yield caught
    except kind as e:
        caught.append(e)
    else:
        raise AssertionError('%s not raised' % kind.__name__)
    while e_chain(caught[-1]):
        caught.append(e_chain(caught[-1]))
    for e in caught:
        LOG.write('%s %r %s' % (e, e, ''.join(traceback.format_exception(type(e), e, e.__traceback__))))


def resident():
    """这个进程占着的内存，字节；不是 Linux 就是 0。"""
    with contextlib.suppress(OSError), open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return 0


def e_chain(error):
    return error.__cause__ or error.__context__


def trickle(handler):
    """一个 `stand_in` 的回答：一个字节一个字节，没完没了。"""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\n\r\n')
    while True:
        handler.wfile.write(b':')
        time.sleep(0.05)


def stand_in(case, answer):
    """本机的一个 HTTP 服务 → 它的 URL;``answer(handler)`` 自己写回答。"""
    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = staticmethod(lambda *args: None)

        def do_GET(self):
            with contextlib.suppress(OSError):      # 听的人走了
                answer(self)

        do_POST = do_GET
    server = type('Server', (socketserver.ThreadingMixIn, http.server.HTTPServer), {'daemon_threads': True})(
        ('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    case.addCleanup(server.server_close)
    case.addCleanup(server.shutdown)
    return 'http://127.0.0.1:%d' % server.server_address[1]


# ---- 错误 Errors ------------------------------------------------------------------------------

class ErrorTests(unittest.TestCase):

    def test_an_error_knows_its_status_and_says_the_rule(self):
        error = CryptoError(ierror.WXBizMsgCrypt_IllegalAesKey)
        self.assertEqual((error.errcode, error.status), (-40004, 500))
        self.assertIn('43 个字母和数字', str(error))
        self.assertEqual(WeChatError(404).status, 404)
        self.assertEqual(ConfigError('x').errcode, 2)

    def test_every_official_code_has_a_sentence(self):
        codes = [v for k, v in vars(ierror).items() if k.startswith('WXBiz') and v]
        self.assertEqual(sorted(codes), list(range(-40011, -40000)))
        for code in codes:
            self.assertTrue(WeChatError(code).errmsg)

    def test_foreign_text_is_escaped_and_cut(self):
        self.assertEqual(easywechat._show('a\r\n\x1b[31m\u2028\ud800'),
                         'a\\u000d\\u000a\\u001b[31m\\u2028\\ud800')
        self.assertEqual(len(easywechat._show('x' * 999)), 203)
        for hidden in '\u202e\u200b\u200f\u2066\ufeff\u061c\xad\u3164\U000e0041':
            with self.subTest(hidden=ascii(hidden)):
                shown = easywechat._show('photo%sgpj.exe' % hidden)
                self.assertTrue(shown.isprintable() and shown.startswith('photo\\'), shown)

    def test_the_catalogue_knows_what_to_do(self):
        seen = [code for codes, _, _ in easywechat._CATALOGUE for code in codes]
        self.assertEqual(len(seen), len(set(seen)))
        self.assertGreater(len(seen), 60)
        error = APIError(60020, 'not allow, from ip: 203.0.113.9, more', 'message/send')
        self.assertEqual(str(error), '%s\uff08message/send: %s, 60020\uff09' % (error.hint, error.errmsg))
        self.assertTrue(error.hint.startswith('出口 IP 不可信\uff1a把 203.0.113.9 加到「应用管理'))
        self.assertEqual(str(APIError(123456, 'x', 'y')), 'y: x, 123456')
        self.assertEqual(APIError(123456, 'x', 'y').hint, '')

    def test_secrets_are_taken_out_of_urls(self):
        secret = 'zQ7plantedzQ7'
        easywechat._secrets.add(secret)
        self.assertEqual(easywechat._show('a?corpsecret=x&key=y&b=1 ' + secret), 'a?corpsecret=***&key=***&b=1 ***')
        for between in '\n', '\r\n', ' ', '\t', '\u200b', '\x1b', '\\n', '\\r\\n', '\\u200b', '\n    ', '中':
            with self.subTest(between=between):
                for text in (secret[:5] + between + secret[5:], between.join(secret)):
                    self.assertEqual(easywechat._show('no %s!' % text), 'no ***!')
                    self.assertNotIn(secret[5:], easywechat._show({'invaliduser': text}))
        for url in 'http://user:%s@proxy' % secret, '//%s@/' % secret, 'http://bob:x@:8080':
            self.assertNotRegex(easywechat._show(url), secret + '|x@')

    def test_foreign_text_takes_linear_time(self):
        names = '<a/&=:@. \\\n\u200b'
        for form in easywechat._TAG, easywechat._SECRET, easywechat._UNPRINTABLE, easywechat._RUNNABLE, \
                re.compile(easywechat._GAP + '+'), easywechat._ECHO:
            for pair in itertools.product(names, repeat=2):
                text, begin = ''.join(pair) * 8192, time.process_time()
                form.sub('', text)
                self.assertLess(time.process_time() - begin, 0.5, (form, pair))


# ---- XML --------------------------------------------------------------------------------------

class XmlTests(unittest.TestCase):

    def test_text_arrives_as_typed(self):
        for text in ('007', '  两端空白  ', ']]>', '<b>&amp;</b>', '&amp;', '😀', '1e5', 'None',
                     '<!DOCTYPE html>', 'a\tb\nc', '', ']]', '<![CDATA[x]]>', '0', 'ÿ\u2028'):
            self.assertEqual(xml_to_dict(dict_to_xml({'Content': text})), {'Content': text})

    def test_nested_and_repeated_elements_stay(self):
        data = {'SelectedItems': {'SelectedItem': [
            {'QuestionKey': 'q1', 'OptionIds': {'OptionId': ['a', 'b', 'c']}},
            {'QuestionKey': 'q2', 'OptionIds': {'OptionId': 'a'}}]}, 'Empty': ''}
        self.assertEqual(xml_to_dict(dict_to_xml(data)), data)

    def test_forbidden_characters_are_dropped_both_ways(self):
        allowed = {9, 10, 13} | set(range(0x20, 0xd800)) | set(range(0xe000, 0xfffe)) | set(range(0x10000, 0x11000))
        for code in range(0x11000):
            self.assertEqual(easywechat._xml_chars(chr(code)), chr(code) if code in allowed else '', hex(code))
        dirty = 'a\x00b\x0bc\ufffed\ud800e\x1f'
        self.assertEqual(xml_to_dict(dict_to_xml({'C': dirty})), {'C': 'abcde'})
        self.assertEqual(xml_to_dict('<xml><C>%s</C></xml>' % dirty), {'C': 'abcde'})

    def test_declarations_blanks_and_bom_are_fine(self):
        for text in ('<?xml version="1.0" encoding="gbk"?>\n<xml><A>中</A></xml>',
                     '\ufeff<xml><A>中</A></xml>', ' \n<xml>\n<A>中</A >\n</xml>\n',
                     '<xml><A><![CDATA[中]]></A><!-- x --></xml>'):
            self.assertEqual(xml_to_dict(text), {'A': '中'})
            self.assertEqual(xml_to_dict(text.encode('utf-8')), {'A': '中'})

    def test_what_is_no_message_is_a_format_exception(self):
        for text in ('', 'x', '<xml>', '<xml></xm>', '<!DOCTYPE xml><xml/>', '<!-- --><xml/>',
                     '<xml>&#0;</xml>', '<xml>&#xd800;</xml>', '<xml>&x;</xml>', '<xml/><xml/>',
                     '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b'\xff\xfe<',
                     '<a>' * 17 + '</a>' * 17, '<a>%s</a>' % ('<b/>' * 20000), 'x' * 1100000,
                     '<a>' * 100000, b'<xml>\xff</xml>', '<xml a="1" a="2"/>'):
            with self.assertRaises(FormatException, msg=text[:50]) as caught:
                xml_to_dict(text)
            self.assertEqual(caught.exception.errcode, -40002)

    def test_a_document_has_a_size(self):
        most = (1 << 20) - len('<xml><a></a></xml>')
        self.assertEqual(len(xml_to_dict('<xml><a>%s</a></xml>' % ('x' * most))['a']), most)
        self.assertRaises(FormatException, xml_to_dict, '<xml><a>%s</a></xml>' % ('x' * (most + 1)))

    def test_what_cannot_be_written_is_a_format_exception(self):
        loop = {}
        loop['a'] = loop
        nest = []
        nest.append(nest)
        for data in (None, 'x', {'a b': '1'}, {1: '1'}, {'a': None}, {'a': 1.5}, {'a': b'x'},
                     {'': '1'}, {'a><b': '1'}, loop, {'a': nest}, {'a': {'1b': ''}}):
            with self.assertRaises(FormatException) as caught:
                dict_to_xml(data)
            self.assertEqual(caught.exception.errcode, -40011)

    def test_numbers_and_booleans(self):
        self.assertEqual(dict_to_xml({'A': 7, 'B': True, 'C': [False, -1]}),
                         '<xml><A>7</A><B>true</B><C>false</C><C>-1</C></xml>')


# ---- 加解密 Crypto ----------------------------------------------------------------------------

Vector = collections.namedtuple(
    'Vector', 'kind token key receive_id query data random16 plaintext')

#: 别的实现的测试向量，出处在每一条上面。
VECTORS = [
    # official doc example (developer.work.weixin.qq.com path 90968/91144), seen in wdk-docs/wework-
    Vector('decrypt_post_xml', 'QDG6eK',
           'jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C', 'wx5823bf96d3bd56c7',
           ('477715d11cdb4164915debcba66cb864d751f3e6', '1409659813', '1372623149'),
           '<xml><ToUserName><![CDATA[wx5823bf96d3bd56c7]]></ToUserName><Encrypt><!['
           'CDATA[RypEvHKD8QQKFhvQ6QleEB4J58tiPdvo+rtK1I9qca6aM/wvqnLSV5zEPeusUiX5L5'
           'X/0lWfrf0QADHHhGd3QczcdCUpj911L3vg3W/sYYvuJTs3TUUkSUXxaccAS0qhxchrRYt66w'
           'iSpGLYL42aM6A8dTT+6k4aSknmPj48kzJs8qLjvd4Xgpue06DOdnLxAUHzM6+kDZ+HMZfJYu'
           'R+LtwGc2hgf5gsijff0ekUNXZiqATP7PF5mZxZ3Izoun1s4zG4LUMnvw2r+KqCKIw+3IQH03'
           'v+BCA9nMELNqbSf6tiWSrXJB3LAVGUcallcrw8V2t9EL4EhzJWrQUax5wLVMNS0+rUPA3k22'
           'Ncx4XXZS9o0MBH27Bo6BpNelZpS+/uh9KsNlY6bHCmJU9p8g7m3fVKn28H3KDYA5Pl/T8Z1p'
           'tDAVe0lXdQ2YoyyH2uyPIGHBZZIs2pDBS8R07+qN+E7Q==]]></Encrypt><AgentID><![C'
           'DATA[218]]></AgentID></xml>',
           '30393630363838393332633437656631',
           '<xml><ToUserName><![CDATA[wx5823bf96d3bd56c7]]></ToUserName>\n<FromUserNa'
           'me><![CDATA[mycreate]]></FromUserName>\n<CreateTime>1409659813</CreateTim'
           'e>\n<MsgType><![CDATA[text]]></MsgType>\n<Content><![CDATA[hello]]></Conte'
           'nt>\n<MsgId>4561255354251345929</MsgId>\n<AgentID>218</AgentID>\n</xml>'),
    # sbzhu/weworkapi_php callback/Sample.php (echostr, key/token from the official doc example)
    Vector('verify_url', 'QDG6eK',
           'jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C', 'wx5823bf96d3bd56c7',
           ('5c45ff5e21c57e6ad56bac8758b79b1d9ac89fd3', '1409659589', '263014780'),
           'P9nAzCzyDtyTWESHep1vC5X9xho/qYX3Zpb4yKa9SKld1DsH3Iyt3tP3zNdtp+4RPcs8TgAE'
           '7OaBO+FZXvnaqQ==',
           '63343162363434393163323436386430',
           '1616140317555161061'),
    # wechatpy/wechatpy tests/test_crypto.py::test_decrypt_message
    Vector('decrypt_post_xml', '123456',
           'kWxPEV2UEDyxWpmPdKC3F4dgPDmOvfKX1HGnEUDS1aR', 'wx49f0ab532d5d035a',
           ('74d92dfeb87ba7c714f89d98870ae5eb62dff26d', '1411525903', '461056294'),
           '<xml><ToUserName><![CDATA[wx49f0ab532d5d035a]]></ToUserName>\n<Encrypt><!'
           '[CDATA[RgqEoJj5A4EMYlLvWO1F86ioRjZfaex/gePD0gOXTxpsq5Yj4GNglrBb8I2BAJVOD'
           'GajiFnXBu7mCPatfjsu6IHCrsTyeDXzF6Bv283dGymzxh6ydJRvZsryDyZbLTE7rhnus50qG'
           'PMfp2wASFlzEgMW9z1ef/RD8XzaFYgm7iTdaXpXaG4+BiYyolBug/gYNx410cvkKR2/nPwBi'
           'T+P4hIiOAQqGp/TywZBtDh1yCF2KOd0gpiMZ5jSw3e29mTvmUHzkVQiMS6td7vXUaWOMZnYZ'
           'lF3So2SjHnwh4jYFxdgpkHHqIrH/54SNdshoQgWYEvccTKe7FS709/5t6NMxuGhcUGAPOQip'
           'vWTT4dShyqio7mlsl5noTrb++x6En749zCpQVhDpbV6GDnTbcX2e8K9QaNWHp91eBdCRxthu'
           'L0=]]></Encrypt>\n<AgentID><![CDATA[1]]></AgentID>\n</xml>',
           '65633930623135333033353864346433',
           '<xml><ToUserName><![CDATA[wx49f0ab532d5d035a]]></ToUserName>\n<FromUserNa'
           'me><![CDATA[messense]]></FromUserName>\n<CreateTime>1411525903</CreateTim'
           'e>\n<MsgType><![CDATA[text]]></MsgType>\n<Content><![CDATA[test]]></Conten'
           't>\n<MsgId>4363689963896700987</MsgId>\n<AgentID>1</AgentID>\n</xml>'),
    # xen0n/go-workwx internal/lowlevel/envelope/mod_test.go
    Vector('decrypt_post_xml', 'kz7Yx62CH8SaLN',
           'cD0d7jx4tYvVtzqrmh3Dm3QFCXe6f8SlHoMtMh3qQEP', 'ww6a112864f8022910',
           ('f265ae551b1932727204c3d707628d01376a6940', '1583995625', '1584392382'),
           '<xml><ToUserName><![CDATA[ww6a112864f8022910]]></ToUserName><Encrypt><!['
           'CDATA[EUCt7xMcNiyASzZj0Hjc5yDjFQrCum6AfQ3ntHiUzjGQ51xieKmbvtrZ40/EcB2W/W'
           '8yH0n4Lqx48gJl/T9HD/R309I0P/r5pIZucK3lyEn48FYMr4YdE0QdL2jIJ3xkcXUr6uzefz'
           'CxG6lMvwpAJaOyVCzN7sRRw47njfxy5EIqU6R9ZBhlTzfdnhhOhK/nTwzrZX3SoGlXFA9OBe'
           'Z6ru1NWpXFk76x9DUMe0lcxPPiUqK8ctnQcYXSGUHVqC6DfG7E7mab0OmruNN8cBZY5d3dYO'
           'BA4OgaH55Q0AJmUpdT8vNiXpXx+6TxT3TIjySXpDrHVyrsb772aYywgg/Nu4kUmGkALwFZlz'
           'hjNegR7wDwb9lr4ERXsSSS8JZ8lbBmaQ3F2Tq584xoPj5rIhXAF734ynm4no1g+SdHiNqR32'
           '8=]]></Encrypt><AgentID><![CDATA[1000002]]></AgentID></xml>',
           '21e33070c56d1ca4e4fa84ace71334f6',
           '<xml><ToUserName><![CDATA[ww6a112864f8022910]]></ToUserName><FromUserNam'
           'e><![CDATA[foobar]]></FromUserName><CreateTime>1583995625</CreateTime><M'
           'sgType><![CDATA[text]]></MsgType><Content><![CDATA[x123]]></Content><Msg'
           'Id>2018405441</MsgId><AgentID>1000002</AgentID></xml>'),
    # Wechat-Group/WxJava weixin-java-common/src/test/java/me/chanjar/weixin/common/util/crypto/WxCr
    Vector('encrypt_only', 'pamtest',
           'abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG', 'wxb11529c136998cb6',
           ('', '', ''),
           'jn1L23DB+6ELqJ+6bruv21Y6MD7KeIfP82D6gU39rmkgczbWwt5+3bnyg5K55bgVtVzd832W'
           'zZGMhkP72vVOfg==',
           '61616161626262626363636364646464',
           '我是中文abcd123'),
    # JeffreySu/WeiXinMPSDK test JSONMsgCryptTest.cs (Senparc.Weixin.Work.Test), class JSONMsgCryptT
    Vector('decrypt_post_json', 'QDG6eK',
           'jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C', '',
           ('f490df6179b86bcaf6fbed0bf32166a477ca6c86', '1409659813', '1372623149'),
           '{"encrypt":"6RS0Ko1VsJN/WaFfxqhNGUtb8r2UxTNONDi2rnT8wc4ArAKL3DATSe52RWiP'
           'tCpMyIFp9wpXdjhNCPcc6TD8n31lGWsLSZeLt0qq8f+XoRDvVkp6Ma+SZjZsFrq8Tays8ugQ'
           '0O1XYJXBdHm4RIkKu2uYgXd+rYwwqi6KiXSh+YX2UJRESFyP9mflQf7HeKLK7eRjIyYUNDAS'
           'VD3c6JKzGXtzC3G9/Gxjiez9r39XvlaJJzQmsqjSraC9o7Io1ny9E6G8pY5udbdiWyB4MFbr'
           'PXJ5tEEiHaIK2WYn7ZqxvRLvuvK/pMoLfDw6O1E2+NZCbkfyzEvWLM4mZnwhzj5Hhg=="}',
           '5965536b706658724d576e59524b4e56',
           '{\n  "msgtype": "text",\n  "text": {\n    "content": "test"\n  },\n  "msgid":'
           ' "1234567890123456",\n  "aibotid": "12345",\n  "chatid": "1234567890123456'
           '",\n  "chattype": null,\n  "from": {\n    "userid": "test"\n  }\n}'),
]


class CryptoTests(unittest.TestCase):

    def test_vectors_of_other_implementations(self):
        for v in VECTORS:
            crypt = WXBizMsgCrypt(v.token, v.key, v.receive_id)
            if v.kind == 'verify_url':
                result = crypt.VerifyURL(*v.query + (v.data,))
                encrypt = v.data
            elif v.kind == 'encrypt_only':
                result, encrypt = (0, crypt.open(v.data.encode())), v.data
            else:
                result = crypt.DecryptMsg(v.data, *v.query)
                encrypt = easywechat._cut_encrypt(v.data.encode()).decode()
            self.assertEqual(result, (0, v.plaintext))
            with swapped(os, 'urandom', lambda n, v=v: bytes.fromhex(v.random16)):
                self.assertEqual(crypt.seal(v.plaintext).decode(), encrypt)

    def test_a_round_trip_through_the_official_methods(self):
        for length in list(range(70)) + [1000, 70000]:
            text = '机' * length
            code, envelope = CRYPT.EncryptMsg(text, 'n0nce', 1700000000)
            self.assertEqual(code, 0)
            d = xml_to_dict(envelope)
            self.assertEqual(CRYPT.DecryptMsg(envelope, d['MsgSignature'], d['TimeStamp'],
                                              d['Nonce']), (0, text))

    def test_the_key_has_exactly_43_characters(self):
        for key in ('', 'a' * 42, 'a' * 44, 'a' * 42 + '=', 'a' * 42 + '中', 'a' * 43 + '\n'):
            with self.assertRaises(FormatException) as caught:      # 官方示例抛的就是它
                WXBizMsgCrypt('t', key, 'c')
            self.assertEqual(caught.exception.errcode, -40004)

    def test_base64_is_strict_before_the_signature_is_looked_at(self):
        for encrypt in (b'', b'=', b'QUJ', b'A===', b'QUJD====', b'QU=D', b'QUJD\n', b'QU-_', b'Q\xc3\xbcJD'):
            query = signed(encrypt)
            with self.assertRaises(CryptoError) as caught:
                CRYPT.verify(query['msg_signature'], query['timestamp'], query['nonce'], encrypt)
            self.assertEqual(caught.exception.errcode, -40010, encrypt)
        for encrypt in b'QUJD', b'QUI=', b'QQ==':
            query = signed(encrypt)
            CRYPT.verify(query['msg_signature'], query['timestamp'], query['nonce'], encrypt)

    def sealed(self, plaintext):
        """任意明文字节（连同填充）→ 密文，总是同一个。"""
        crypt = WXBizMsgCrypt(*(SETTINGS[key] for key in ('token', 'encoding_aes_key', 'corpid')))
        return binascii.b2a_base64(crypt._encryptor.encrypt(plaintext), newline=False)

    def test_padding_length_and_receive_id_are_strict(self):
        rid = SETTINGS['corpid'].encode()
        good = bytes(16) + struct.pack('>I', 2) + b'hi' + rid
        pad = 32 - len(good) % 32
        cases = [(good + bytes([pad]) * pad, 0), (good + bytes([pad]) * (pad - 1) + b'\0', -40007),
                 (good + bytes(pad - 1) + bytes([pad]), -40007), (bytes(64), -40007),
                 (b'\x21' * 64, -40007), (bytes(24) + b'\x08' * 8, -40005),
                 (b'\x20' * 64, -40008), (bytes(16) + b'\xff' * 4 + b'\x0c' * 12, -40008),
                 (bytes(13) + b'\x13' * 19, -40007),
                 (bytes(16) + struct.pack('>I', 2) + b'\xff\xfe' + rid + bytes([pad]) * pad, -40008)]
        for plaintext, code in cases:
            for between in '', '又一条':           # 解出来的第一块是什么，不影响结果
                if between:
                    CRYPT.seal(between)
                encrypt = self.sealed(plaintext)
                q = signed(encrypt)
                body = '<xml><Encrypt>%s</Encrypt></xml>' % encrypt.decode()
                self.assertEqual(CRYPT.DecryptMsg(body, *q.values())[0], code, plaintext)

    def test_every_ciphertext_stands_for_itself(self):
        aes = easywechat._aes()
        key = binascii.a2b_base64(SETTINGS['encoding_aes_key'] + '=')
        texts = ['%d' % n * n for n in range(1, 200)]
        sealed = []

        def seal(part):
            sealed.extend((CRYPT.seal(text), text) for text in part)
        threads = [threading.Thread(target=seal, args=(texts[n::8],)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len({encrypt[:20] for encrypt, _ in sealed}), len(texts))
        for encrypt, text in sorted(sealed):        # 另一个次序；别人照 CBC 的定义，一条一个对象
            self.assertEqual(CRYPT.open(encrypt), text)
            plain = aes.new(key, aes.MODE_CBC, key[:16]).decrypt(binascii.a2b_base64(encrypt))
            self.assertEqual(plain[16:20 + len(text)], struct.pack('>I', len(text)) + text.encode())

    def test_official_codes(self):
        encrypt = CRYPT.seal('hi')
        query = list(signed(encrypt).values())
        body = '<xml><Encrypt>%s</Encrypt></xml>' % encrypt.decode()
        other = WXBizMsgCrypt(SETTINGS['token'], SETTINGS['encoding_aes_key'], 'wwother')
        keyless = WXBizMsgCrypt(SETTINGS['token'], 'b' * 43, SETTINGS['corpid'])
        flipped = ['0' * 40] + query[1:]
        short = 'AAAA' * 4
        self.assertEqual(CRYPT.DecryptMsg(body, *query), (0, 'hi'))
        self.assertEqual(CRYPT.DecryptMsg(body.encode(), *query), (0, 'hi'))
        self.assertEqual(CRYPT.DecryptMsg(json.dumps({'encrypt': encrypt.decode()}), *query),
                         (0, 'hi'))
        self.assertEqual(CRYPT.DecryptMsg(body, *flipped)[0], -40001)
        self.assertEqual(CRYPT.DecryptMsg(body, query[0], query[1], 'x' * 64)[0], -40001)
        self.assertEqual(CRYPT.DecryptMsg(body, None, None, None)[0], -40001)
        self.assertEqual(CRYPT.DecryptMsg('<xml></xml>', *query)[0], -40002)
        self.assertEqual(CRYPT.EncryptMsg('x', '', 1700000000)[0], -40003)
        self.assertEqual(CRYPT.EncryptMsg('x', 'n', 17)[0], -40003)
        self.assertEqual(CRYPT.EncryptMsg('x', 1372623149)[0], -40003)
        self.assertEqual(CRYPT.DecryptMsg(None, *query)[0], -40003)
        self.assertEqual(other.DecryptMsg(body, *query)[0], -40005)
        self.assertEqual(CRYPT.EncryptMsg(None, 'n')[0], -40006)
        self.assertEqual(CRYPT.EncryptMsg('\ud800', 'n')[0], -40006)
        fixed = self.sealed(bytes(64))      # 随机的，错的密钥解出来，二百多次里有一次像填充
        self.assertEqual(keyless.DecryptMsg('<xml><Encrypt>%s</Encrypt></xml>' % fixed.decode(),
                                            *signed(fixed).values())[0], -40007)
        self.assertEqual(CRYPT.VerifyURL(*list(signed(short.encode()).values()) + [short])[0],
                         -40007)
        self.assertEqual(CRYPT.VerifyURL(*query + ['a b!'])[0], -40010)
        while b'+' not in encrypt:
            encrypt = CRYPT.seal('hi')
        query = list(signed(encrypt).values()) + [encrypt.decode().replace('+', ' ')]
        self.assertEqual(CRYPT.VerifyURL(*query), (0, 'hi'))

    def test_no_aes_block_can_move_into_the_nonce(self):
        encrypt = CRYPT.seal(message(Content='x' * 200)).decode()
        for cut in 64, 63:
            nonce, rest = encrypt[:cut], encrypt[cut:]
            parts = sorted([SETTINGS['token'], '1700000000', nonce, rest])
            query = hashlib.sha1(''.join(parts).encode()).hexdigest(), '1700000000', nonce
            self.assertEqual(CRYPT.DecryptMsg('<xml><Encrypt>%s</Encrypt></xml>' % rest, *query)[0],
                             -40001 if cut == 64 else -40010)

    def test_the_envelope_is_cut_not_parsed(self):
        cut = easywechat._cut_encrypt
        for body in (b'<xml><Encrypt>QUJD</Encrypt></xml>', b' {"encrypt":"QUJD", "agentid": 1}',
                     b'<xml><Encrypt> <![CDATA[QUJD]]>\n</Encrypt></xml>', b'{"Encrypt": "QUJD"}'):
            self.assertEqual(cut(body), b'QUJD')
        for body in (b'', b'x', b'<Encrypt>a</Encrypt><Encrypt>b</Encrypt>', b'</Encrypt><Encrypt>',
                     b'{', b'{}', b'{"encrypt": 1}', b'[]', b'{"a": NaN, "encrypt": "QUJD"}', b'{"encrypt":"\xff"}',
                     b'{"encrypt":"\\ud800"}', b'{"a":' + b'[' * 60000, b'{"encrypt":{"a":[]}}',
                     b'{"encrypt": "QUJD", "a": [' + b'1,' * 70 + b'1]}'):
            with self.assertRaises(FormatException, msg=body[:30]):
                cut(body)

    def test_bombs_before_the_signature_cost_little(self):
        q = list(signed(b'QUJD').values())
        for unit in (b'[', b'{"a":', b' ', b'<Encrypt>', b'1', b'<a>', b'{"encrypt":1', b'&a;', b'A'):
            for prefix in b'', b'{', b'<Encrypt>':
                body = (prefix + unit * ((1 << 20) // len(unit)))[:1 << 20]
                begin = time.process_time()
                self.assertLess(CRYPT.DecryptMsg(body, *q)[0], 0)
                self.assertLess(time.process_time() - begin, 0.2, (prefix, unit))

    def test_random_and_mutated_input_raises_nothing_else(self):
        rng = random.Random(42)
        encrypt = CRYPT.seal(message(Content='变'))
        query = list(signed(encrypt).values())
        body = bytearray(b'<xml><Encrypt><![CDATA[' + encrypt + b']]></Encrypt></xml>')
        for _ in range(2000):
            changed = bytearray(body)
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] = rng.getrandbits(8)
            code, text = CRYPT.DecryptMsg(bytes(changed), *query)
            self.assertTrue(code < 0 or changed.lower() != body)
            raw = bytearray(message(Content='变').encode())
            raw[rng.randrange(len(raw))] = rng.getrandbits(8)
            with contextlib.suppress(FormatException):
                xml_to_dict(bytes(raw))
            with contextlib.suppress(CryptoError):
                CRYPT.open(bytes(rng.choice(encrypt) for _ in range(rng.randint(0, 200))))


# ---- 配置 Configuration -----------------------------------------------------------------------

class ConfigTests(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, 'config.ini')

    def write(self, text, mode=0o600):
        with open(self.path, 'wb') as f:
            f.write(text if isinstance(text, bytes) else text.encode())
        os.chmod(self.path, mode)

    def test_values_are_cleaned_never_converted(self):
        self.write("[demo]\ncorpid = 'ww1'\ntoken=\u3000t%(x)s \u200b\nappid: 007\n"
                   '[system]\nroute_name = "cb" # 注释\n')
        config = get_config('demo', self.path)
        self.assertEqual([config[k] for k in ('corpid', 'token', 'agentid', 'appid', 'route_name',
                                              'secret')], ['ww1', 't%(x)s', '007', '007', 'cb', ''])
        self.assertNotIn('t%', repr(config))

    def test_what_editors_and_people_write_is_understood(self):
        good = '# 注释\n[应用]\ntoken = 甲\n[other]\nx = 1\n'
        for what, data in (
                ('utf-8', good.encode()), ('BOM', good.encode('utf-8-sig')), ('gb18030', good.encode('gb18030')),
                ('utf-16', good.encode('utf-16')), ('utf-16-be', b'\xfe\xff' + good.encode('utf-16-be')),
                ('CRLF', good.replace('\n', '\r\n').encode()), ('CR', good.replace('\n', '\r').encode()),
                ('indented', good.replace('\n', '\n \t').encode()), ('a colon', good.replace('= ', ':').encode()),
                ('quotes', good.replace('甲', '\u201c甲\u201d').encode()),
                ('a comment', good.replace('甲', '甲 # x').encode()),
                ('a comment behind a section', good.replace('用]', '用] ; x').encode()),
                ('no end', good.encode().rstrip()), ('a full-width blank', good.replace(' ', '\u3000').encode())):
            with self.subTest(what):
                self.write(data)
                self.assertEqual(get_config('应用', self.path)['token'], '甲')
                self.assertEqual(easywechat.get_section('other', self.path), {'x': '1'})
        self.write('[llm]\nprompt = 你是\n  一个\n\t机器人\n')
        self.assertEqual(easywechat.get_section('llm', self.path), {'prompt': '你是\n一个\n机器人'})

    def test_the_keys_of_the_console_are_understood(self):
        self.write('[demo]\nCorpID = a\ncorpSecret = b\nEncodingAESKey = c\nAgentId = 7\nToUser = e\nca-file = f\n')
        config = get_config('demo', self.path)
        self.assertEqual([config[k] for k in ('corpid', 'secret', 'encoding_aes_key', 'agentid', 'touser', 'ca_file')],
                         ['a', 'b', 'c', '7', 'e', 'f'])
        for text, words in (('user = %s', '没有 user 这个键，是不是 touser？'), ('tokne = %s', '是不是 token？'),
                            ('zzz = %s', '没有 zzz 这个键'), (PLANTED * 3 + ' = 1', '没有 一个 这个键')):
            with self.subTest(text):
                self.write('[demo]\ncorpid = a\n' + text.replace('%s', PLANTED))
                with self.assertLogs('easywechat', 'WARNING') as logs:
                    config = get_config('demo', self.path)
                self.assertEqual(len(logs.output), 1)
                self.assertIn(words, logs.output[0])
                self.assertEqual(len(config.unknown), 1)
                self.assertNotIn(PLANTED.lower(), logs.output[0].lower())

    def test_environment_fills_in_and_keywords_win(self):
        self.write('[demo]\ntoken = file\n')
        with environment(EASYWECHAT_TOKEN='env', EASYWECHAT_CORPID='env',
                         EASYWECHAT_CONFIG=self.path):
            config = get_config('demo', secret='kw')
        self.assertEqual((config['token'], config['corpid'], config['secret']),
                         ('file', 'env', 'kw'))

    def test_errors_name_the_place_and_no_value(self):
        s = PLANTED
        for text, words in (
                ('secret ' + s, '第 1 行：没有等号'), ('[demo]\n' + s, '第 2 行：没有等号'),
                ('[a]\nx=1\nx=' + s, '第 3 行：第 2 行已经写过这个键了'),
                ('[a]\n[b]\n[a]', '第 3 行：第 1 行已经有这一节了'),
                ('[a]\ntoken\uff1d' + s, '第 2 行：等号要用半角的 ='),
                ('[a]\ntoken\uff1a' + s, '第 2 行：等号要用半角的 ='),
                ('[a]\napi_base\uff1dhttps://' + s, '等号要用半角的 ='),
                ('\u3010demo\u3011\ntoken = ' + s, '第 1 行：节名要用半角'),
                ('\uff3bdemo\uff3d', '节名要用半角'),
                ('[demo', '节名要单独一行'),
                ('[demo] token = ' + s, '节名要单独一行'),
                ('[a]\n\uff03 ' + s, '第 2 行：# 要用半角的'), ('[a]\n// ' + s, '第 2 行：注释要以 # 开头'),
                ('[a]\n//token = ' + s, '第 2 行：注释要以 # 开头'), ('token = ' + s, '第 1 行：前面还没有节名'),
                ('[a]\n = ' + s, '等号左边没有键'), ('[a]\ntoken ' + s + ' = 1', '第 2 行：'),
                ('', '是空的；删掉它'), ('# ' + s, '是空的；删掉它'),
                ('[other]\n', '没有 [demo] 这一节，有的是 [other]'), ('[a]\x00', '第 1 行'),
                ('[demo]\nsecret = a\ncorpsecret = ' + s, 'secret 写了两次'),
                ('[demo]\nsecret = a\n ' + s, 'secret 下面的一行没有等号'),
                (b'[demo]\ntoken = \xff\xff\xff', '另存为 UTF-8'), ('#' * (2 << 20), '一兆多')):
            with self.subTest(text[:40]):
                self.write(text)
                with self.assertRaises(ConfigError) as caught:
                    get_config('demo', self.path)
                self.assertIn(words, str(caught.exception))
                self.assertNotIn(PLANTED, repr(caught.exception))
                self.assertNotRegex(str(caught.exception), '[A-Z][a-z]+Error')
        with self.assertRaises(ConfigError) as caught:
            get_config('demo', self.path + '.no')
        self.assertIn(self.path + '.no', str(caught.exception))
        with self.assertRaises(TypeError):
            get_config('demo', self.path, tokne='x')

    def test_a_config_that_is_a_folder_is_named(self):
        os.mkdir(self.path)
        for call in (lambda: get_config('demo', self.path), lambda: easywechat.get_section('nas', self.path)):
            with self.assertRaises(ConfigError) as caught:
                call()
            self.assertIn('Docker', str(caught.exception))

    @unittest.skipUnless(os.name == 'posix', 'POSIX 的权限')
    def test_a_file_that_anybody_can_change_is_refused(self):
        self.write('[demo]\n', 0o602)
        self.assertRaises(ConfigError, get_config, 'demo', self.path)
        self.write('[demo]\n', 0o644)
        with self.assertLogs('easywechat', 'WARNING') as logs:
            get_config('demo', self.path)
        self.assertIn('chmod 600', logs.output[0])

        def everything(*args, **kwargs):        # exFAT：建什么都是 0777
            f = real(*args, **kwargs)
            os.chmod(f.fileno(), 0o777)
            return f
        real = tempfile.TemporaryFile
        self.write('[demo]\ntoken = x\n', 0o777)
        with swapped(tempfile, 'TemporaryFile', everything), self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertEqual(get_config('demo', self.path)['token'], 'x')
        self.assertIn('EASYWECHAT_SECRET', logs.output[0])

    def test_what_a_server_needs_is_named(self):
        for key in 'corpid', 'token', 'encoding_aes_key':
            with self.assertRaises(ConfigError) as caught:
                WeChatServer('x', **dict(SETTINGS, **{key: ''}))
            self.assertIn(key, str(caught.exception))
        self.assertRaises(ConfigError, WeChatServer, 'x', route_name='a b', **SETTINGS)
        self.assertRaises(ConfigError, WeChatServer, 'x', secret='s', api_base='ftp://x', **SETTINGS)

    def test_the_example_is_what_init_writes(self):
        with open(os.path.join(HERE, 'config.ini.example'), encoding='utf-8') as f:
            self.assertEqual(f.read(), easywechat._CONFIG_TEMPLATE.format(
                corpid='', token='', encoding_aes_key=''))

    def test_a_section_of_ones_own(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'c.ini')
            with open(path, 'wb') as f:
                f.write('[nas]\ndisk = "90"  # 百分之\nname=硬盘\n'.encode('gb18030'))
            os.chmod(path, 0o600)
            self.assertEqual(easywechat.get_section('nas', path), {'disk': '90', 'name': '硬盘'})
            self.assertEqual(easywechat.get_section('llm', path), {})
            with environment(EASYWECHAT_CONFIG=path + 'x'):
                self.assertEqual(easywechat.get_section('nas'), {})


    def test_the_first_hour(self):
        """人会写错的：（把什么换成什么，开始服务时说的一句，--check 说的一句）；空的是照常。"""
        key = SETTINGS['encoding_aes_key']
        good = ('[demo]\ncorpid = wwABCDEF0123456789\ntoken = QDG6eK\nencoding_aes_key = %s\n'
                'agentid = 1000002\nsecret = %s\ntouser = zhangsan\n[system]\nlog_path =\n' % (key, 's' * 43))
        wide = str.maketrans({chr(c): chr(c + 0xfee0) for c in range(33, 127)})
        odd = '（含空白、全角或不可见字符）'
        for old, new, start, check in (
                ('', '', '', ''),
                ('wwABCDEF0123456789', '', '没有写 corpid：写进 config.ini 的 [demo]', 'corpid 没有写'),
                ('wwABCDEF0123456789', 'wwABCDEF0123456789'.translate(wide), '', odd + '：应以 ww 开头'),
                ('wwABCDEF0123456789', 'ww你的企业ID', '', odd + '：应以 ww 开头'),
                (key, key.translate(wide), '现在是 0 个，还有 43 个别的字符', odd + '：应该恰好是 43'),
                (key, key[:42], '恰好是 43 个字母和数字，现在是 42 个', '现在有 42 个字符'),
                (key, key + '=', '现在是 43 个，还有 1 个别的字符', '现在有 44 个字符'),
                (key, key[:20] + ' ' + key[20:], '现在是 43 个，还有 1 个别的字符', odd), (key, key + '\u200b', '', ''),
                ('QDG6eK', '"QDG6eK"', '', ''), ('QDG6eK', '\u201cQDG6eK\u201d', '', ''),
                ('QDG6eK', 'QDG6eK # 注释', '', ''), ('QDG6eK', 't' * 40, '', '至多 32 个字母和数字，现在有 40 个'),
                ('QDG6eK', '令牌', '', odd + '：应该是至多 32'), ('1000002', '应用', '', odd + '：应该是一个数字'),
                ('agentid', 'appid', '', ''), ('zhangsan', '张三', '', '应该是「账号」，不是姓名'),
                ('zhangsan', 'a, b', '', ''), ('encoding_aes_key', 'EncodingAESKey', '', ''),
                ('secret =', 'CorpSecret =', '', ''),
                ('token =', 'tokem =', '没有写 token', '没有 tokem 这个键，是不是 token'),
                ('[demo]', '[Demo]', '没有 [demo] 这一节，有的是 [Demo]：节名和程序里的名字要一样', None),
                ('log_path =', 'route_name = /weixin/', '', ''),
                ('log_path =', 'route_name = 微信', 'route_name 只能用', 'route_name 只能用'),
                ('log_path =', 'log_path = /nosuch/dir', '', '写不了日志 /nosuch/dir/easywechat.log：'),
                ('agentid', 'robot = 693a91f6-7xxx\nagentid', '', 'Webhook 地址'),
                ('agentid', 'api_base = vps.example.com\nagentid', '', ''),
                ('agentid', 'api_base = https://vps example.com\nagentid', 'api_base 应该像', 'api_base 应该像'),
                ('agentid', 'api_base = https://vps.example.com/?a=1\nagentid', 'api_base 应该像', 'api_base 应该像')):
            with self.subTest(new[:30]):
                self.write(good.replace(old, new, 1))
                said = ''
                try:
                    WeChatServer('demo', self.path)
                except WeChatError as e:
                    said = str(e)
                self.assertIn(start, said)
                self.assertEqual(bool(start), bool(said), said)
                if check is not None:
                    found = easywechat._check_settings(get_config('demo', self.path))
                    bad = [text for fine, text in found if fine is False]
                    self.assertEqual(len(bad), bool(check) + (new == 'tokem ='), bad)
                    self.assertIn(check, '\n'.join(bad))

    def test_what_a_program_needs_is_named(self):
        self.write('[监控]\ncorpid = ww1\nsecret = s\nbot_id = aib1\n')
        self.assertEqual(get_config('监控', self.path, needs=('corpid', 'secret'))['secret'], 's')
        for needs, missing in (('touser', 'touser'), (('secret', 'agentid'), 'agentid'), ('corpid token', 'token')):
            with self.assertRaises(ConfigError) as caught:
                get_config('监控', self.path, needs)
            self.assertEqual(caught.exception.errmsg, '没有写 %s：写进 config.ini 的 [监控]，或环境变量 '
                             'EASYWECHAT_%s' % (missing, missing.upper()))
        got = get_config('监控', self.path, ['secret', 'agentid', 'touser'], bot_secret='b', touser='z')
        self.assertEqual((got['agentid'], got['touser']), ('', 'z'))        # 智能机器人
        self.assertRaises(TypeError, get_config, '监控', self.path, ['secrets'])
        with self.assertRaises(ConfigError):
            make_server(needs=['touser'])


class NeighbourTests(unittest.TestCase):
    """同一台机器上别的用户的 config.ini，在我们恰好在的目录里。"""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder, self.code = (os.path.join(holder.name, name) for name in ('here', 'code'))
        for folder in self.folder, self.code:
            os.mkdir(folder, 0o755)
        self.source = shutil.copy(SOURCE, self.code)
        self.listener = socket.socket()
        self.addCleanup(self.listener.close)
        self.listener.bind(('127.0.0.1', 0))
        self.listener.listen(5)
        self.listener.settimeout(0.05)
        self.path = os.path.join(self.folder, 'config.ini')
        self.base = 'http://127.0.0.1:%d' % self.listener.getsockname()[1]
        self.write('corpid = wwneighbour0000000\nagentid = 1\ntouser = @all\napi_base = ' + self.base)

    def write(self, text):
        with open(self.path, 'w') as f:
            f.write('[demo]\n' + text + '\n')
        os.chmod(self.path, 0o600)

    def send(self, *args, **env):
        """cron 那样在那个目录里跑 →（退出码，stderr, 连到 api_base 没有）。"""
        env = dict({k: v for k, v in os.environ.items() if not k.startswith('EASYWECHAT_')}, PYTHONIOENCODING='utf-8',
                   XDG_CACHE_HOME=self.code, https_proxy='http://127.0.0.1:9', no_proxy='127.0.0.1', **env)
        process = subprocess.Popen([sys.executable, self.source] + list(args or ['--send', 'x']), cwd=self.folder,
                                   env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        connected = False
        while process.poll() is None:
            with contextlib.suppress(socket.timeout):
                self.listener.accept()[0].close()
                connected = True
        return process.returncode, process.communicate()[1].decode(), connected

    def test_what_others_can_change_is_not_read(self):
        secret = {'EASYWECHAT_SECRET': PLANTED, 'EASYWECHAT_ROBOT': PLANTED + '-a-b'}
        cases = [lambda: os.chmod(self.folder, 0o777), lambda: os.chmod(self.folder, 0o1777),
                 lambda: (os.chmod(self.folder, 0o755), os.chmod(self.path, 0o622)),
                 lambda: (os.chmod(self.path, 0o600), os.rename(self.path, os.path.join(self.code, 'x')),
                          os.chmod(self.code, 0o777), os.symlink(os.path.join(self.code, 'x'), self.path))]
        if os.geteuid() == 0:           # 别人的目录，别人的文件
            cases[:0] = [lambda: os.chown(self.folder, 65534, 65534), lambda: os.chown(self.path, 65534, 65534),
                         lambda: os.chown(self.folder, 0, 0)]
        for n, make in enumerate(cases):
            make()
            with environment(**secret), working_in(self.folder), swapped(easywechat, '__file__', self.source), swapped(
                    sys.modules['__main__'], '__file__', self.source), self.assertLogs('easywechat', 'WARNING'):
                self.assertEqual(get_config('demo')['api_base'], '')
            for args in ((), ('--robot', '--send', 'x'))[:2 if n == 0 else 0]:
                code, err, connected = self.send(*args, **secret)
                self.assertFalse(connected)
                self.assertEqual(code, 3 if args else 2, err)
                self.assertIn('%s is not read：当前目录里的这个文件别人也能改' % os.path.join(
                    os.path.realpath(self.folder), 'config.ini'), err)
        os.unlink(self.path)
        self.assertNotIn('is not read', self.send(**secret)[1])

    def test_credentials_from_elsewhere_do_not_go_to_its_api_base(self):
        for args, name in ((), 'SECRET'), (('--robot', '--send', 'x'), 'ROBOT'):
            code, err, connected = self.send(*args, **{'EASYWECHAT_' + name: PLANTED + '-key'})
            self.assertEqual((code, connected), (2, False), err)
            self.assertIn('%s 里的 api_base 得不到别处的密钥' % os.path.realpath(self.path), err)
        named = {'EASYWECHAT_CONFIG': self.path}            # 自己说了的
        self.assertEqual(self.send(EASYWECHAT_SECRET=PLANTED, **named)[::2], (3, True))
        self.write('corpid = ww\nagentid = 1\ntouser = a')
        self.assertEqual(self.send(EASYWECHAT_SECRET=PLANTED, EASYWECHAT_API_BASE=self.base)[::2], (3, True))
        self.write('corpid = ww\nsecret = %s\nagentid = 1\ntouser = a\napi_base = %s' % (PLANTED, self.base))
        self.assertEqual(self.send()[::2], (3, True))           # 都是自己文件里的

    def test_sections_of_a_program_come_from_no_neighbour_either(self):
        self.write('corpid = ww\n[llm]\nbase_url = http://evil.example')
        with environment(EASYWECHAT_SECRET=PLANTED), working_in(self.folder), swapped(
                easywechat, '__file__', self.source), swapped(sys.modules['__main__'], '__file__', self.source):
            self.assertEqual(easywechat.get_section('llm'), {'base_url': 'http://evil.example'})
            os.chmod(self.folder, 0o777)
            with self.assertLogs('easywechat', 'WARNING'):
                self.assertEqual(easywechat.get_section('llm'), {})

    @unittest.skipUnless(os.name == 'posix' and os.geteuid() == 0, '要能换成别的用户')
    def test_a_bot_that_owns_only_its_state(self):
        """README 的 systemd：程序是 root 的，bot 读得到 config.ini，只能写自己的状态。"""
        state = tempfile.mkdtemp(dir=self.code)
        self.path = os.path.join(self.code, 'config.ini')
        self.write('corpid = wwneighbour0000000\ntoken = %s\nencoding_aes_key = %s' % (
            SETTINGS['token'], SETTINGS['encoding_aes_key']))
        os.chown(self.path, 0, 65534)
        os.chmod(self.path, 0o640)
        os.chown(state, 65534, 65534)
        os.chmod(os.path.dirname(self.code), 0o755)
        code = ('import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.path[:0] = [%r]\n'
                'try: import binascii, struct, socket\n'
                'except ImportError: sys.exit(77)\n'
                'import easywechat, __main__\n'
                '__main__.__file__ = easywechat.__file__\n'
                'settings = easywechat.get_config("demo")\n'
                'print(all(good for good, _ in easywechat._check_settings(settings) if good is not None))\n'
                'easywechat.FileStore(easywechat.state_folder()).set("a", b"1")\n'
                'print(len(os.listdir(os.environ["XDG_STATE_HOME"] + "/easywechat")))\n'
                'code = easywechat.__file__\n'
                'print([p for p in (code, os.path.dirname(code)) if os.access(p, os.W_OK)])\n'
                ) % self.code
        done = subprocess.run([sys.executable, '-B', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd='/', env=dict(os.environ, XDG_STATE_HOME=state, HOME='/nonexistent'))
        if done.returncode == 77:
            self.skipTest('别的用户读不到这个 Python')
        self.assertEqual(done.stdout.decode().split('\n')[:3], ['True', '1', '[]'], done.stderr)
        self.assertNotIn(b'chmod', done.stderr)

    @unittest.skipUnless(os.name == 'posix' and os.geteuid() == 0 and os.path.exists('/usr/bin/python3'), '要是 root')
    def test_the_recipe_for_nut_works_for_its_user(self):
        """README 的 alert.sh，以另一个用户：config.ini 是 0640，那一组的。"""
        wecom = simulator.WeCom()
        self.addCleanup(wecom.stop)
        settings = dict(wecom.settings, api_base=wecom.start())
        self.path = os.path.join(self.code, 'config.ini')
        self.write('\n'.join('%s = %s' % item for item in settings.items()))
        os.chown(self.path, 0, 65534)
        os.chmod(self.path, 0o640)
        os.chmod(os.path.dirname(self.code), 0o755)
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            script = re.search('```sh\n(#!/bin/sh\n[^`]*:-[$]1}"\n)```', f.read()).group(1)
        path = os.path.join(self.code, 'alert.sh')
        with open(path, 'w') as f:
            f.write(script.replace('/opt/bot', self.code))
        os.chmod(path, 0o755)
        os.chmod(self.source, 0o644)

        def become():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        done = subprocess.run([path, '断电了 --to @all'.encode()], preexec_fn=become, cwd='/', stderr=subprocess.PIPE,
                              env={'PATH': '/usr/bin:/bin', 'HOME': '/nonexistent'})
        self.assertEqual((done.returncode, done.stderr), (0, b''))
        sent, = wecom.messages
        self.assertEqual((sent['text']['content'], sent['touser']), ('断电了 --to @all', 'zhangsan'))


# ---- 存储 Store -------------------------------------------------------------------------------

class StoreTests(unittest.TestCase):

    def test_it_speaks_a_part_of_redis(self):
        store, now = MemoryStore(), [0.0]
        store._clock = lambda: now[0]
        self.assertTrue(store.set('a', b'1', ex=10, nx=True))
        self.assertIsNone(store.set('a', b'2', ex=10, nx=True))
        self.assertEqual(store.get('a'), b'1')
        self.assertTrue(store.set('a', b'3', ex=20))
        now[0] = 19.9
        self.assertEqual(store.get('a'), b'3')
        now[0] = 20
        self.assertIsNone(store.get('a'))
        self.assertTrue(store.set('a', b'4', nx=True))
        self.assertEqual((store.delete('a'), store.delete('a')), (1, 0))

    def test_it_is_bounded_and_forgets_the_oldest(self):
        store = MemoryStore()
        store.max_entries, store.max_bytes = 64, 16000
        for n in range(200):
            store.set('n%d' % n, b'x')
        kept = [n for n in range(200) if store.get('n%d' % n)]
        self.assertEqual(kept, list(range(kept[0], 200)))
        self.assertTrue(56 <= len(kept) <= 64, len(kept))
        for n in range(500):
            store.set('b%d' % n, b'y' * 90)
        self.assertLessEqual(sum(len(store.get('b%d' % n) or b'') for n in range(500)), 17000)
        self.assertEqual((store.get('b499'), store.get('b450')), (b'y' * 90, b'y' * 90))

    def test_of_many_who_claim_one_wins(self):
        def claim(store, wins, gate):
            for n in range(300):
                gate.wait(10)
                if store.set('%d' % n, b'-', ex=60, nx=True):
                    wins.append(n)
        before = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, before)
        sys.setswitchinterval(1e-6)
        store, wins, gate = MemoryStore(), [], threading.Barrier(6)
        threads = [threading.Thread(target=claim, args=(store, wins, gate)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(wins), list(range(300)))

    def test_what_memory_remembered_while_a_store_was_down_still_counts(self):
        inner = Redis()
        store = easywechat._steady(inner, WeChatClient)
        inner.broken = True
        with self.assertLogs('easywechat', 'WARNING'):
            self.assertTrue(store.set('a', b'1', nx=True))
            self.assertTrue(store.claim('b', 3))
            inner.broken, store._until = False, 0           # 好了
        self.assertIsNone(store.set('a', b'2', nx=True))
        self.assertIsNone(store.claim('b', 3))
        self.assertEqual((store.get('a'), inner.store.get('a')), (b'1', None))
        store.set('a', b'3')
        self.assertEqual((store.get('a'), inner.store.get('a')), (b'3', b'3'))

    def test_long_answers_push_out_long_answers_and_no_claim(self):
        store = MemoryStore()
        for n in range(9000):               # 一秒十条，十五分钟
            self.assertTrue(store.claim('easywechat:message:%064d' % n, 3))
            store.set('easywechat:message:%064d' % n, b'+' + b'x' * 2000, ex=900)
        for n in range(9000):
            self.assertIsNone(store.claim('easywechat:message:%064d' % n, 3), n)
            self.assertIn(store.get('easywechat:message:%064d' % n), (b'', b'+' + b'x' * 2000))
        self.assertLess(sum(len(store.get('easywechat:message:%064d' % n)) for n in range(9000)), 4 << 20)
        store.set('a', b'y' * 100)
        store.set('a', b'small')
        self.assertEqual((store.get('a'), store.delete('a'), store.get('a')), (b'small', 1, None))

    def test_a_store_that_failed_is_probed_by_one_while_others_go_on(self):
        redis = Redis()
        server = make_server(store=redis)
        server.store_within, server.store.retry_after, redis.broken = 5, 0.2, True
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertTrue(server.store.set('a', b'1'))
            self.assertEqual((server.store.get('a'), redis.calls), (b'1', 1))
            time.sleep(0.25)
            server.store.retry_after, redis.broken, redis.calls = 60, False, 0
            redis.stalled = lambda *args, **kwargs: True
            done = []
            threads = [threading.Thread(target=lambda: done.append(server.store.get('b'))) for _ in range(20)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 2
            while (len(done) < 19 or not redis.calls) and time.monotonic() < deadline:
                time.sleep(0.005)
            self.assertEqual((redis.calls, done), (1, [None] * 19))
            redis.go_on.set()
            for thread in threads:
                thread.join(5)
        self.assertEqual([line.split(':')[0] for line in logs.output], ['ERROR', 'WARNING'])
        redis.set('b', b'2')
        self.assertEqual((server.store.get('b'), server.store.get('a')), (b'2', b'1'))


class CallTests(unittest.TestCase):
    """别的线程上的一次调用。"""

    @unittest.skipUnless(os.name == 'posix', 'fcntl')
    def test_a_process_that_stopped_while_it_claimed_breaks_no_store(self):
        code = ('import sys, easywechat\nwith easywechat.FileStore(sys.argv[1]).lock("x"):\n'
                '    print(flush=True)\n    sys.stdin.read()')
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.Popen([sys.executable, '-c', code, folder], cwd=HERE, stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE)
            child.stdout.readline()
            store = easywechat._steady(FileStore(folder), make_server())
            self.assertIsNone(store.claim('x', 3))
            self.assertEqual((store._until, store.get('x')), (0, None))
            child.communicate()
            self.assertTrue(store.claim('x', 3))

    def test_whoever_got_a_thread_late_gets_time_to_answer(self):
        threads, go = easywechat._Threads(1), threading.Event()
        threads.submit(0, go.wait)
        threading.Timer(0.18, go.set).start()
        self.assertEqual(easywechat._within(threads, 0.2, lambda: time.sleep(0.1) or 'x'), 'x')
        begin = time.monotonic()
        with self.assertRaises(socket.timeout):
            easywechat._within(threads, 0.2, lambda: go.clear() or go.wait(3))
        go.set()
        self.assertLess(time.monotonic() - begin, 1)


class FileStoreTests(unittest.TestCase):

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = os.path.join(holder.name, 'a', 'b')
        self.store, self.now = FileStore(self.folder), [1800000000.0]
        self.store._now = self.store._clock = lambda: self.now[0]

    def files(self):
        return [os.path.join(self.folder, n) for n in os.listdir(self.folder) if len(n) == 40]

    def test_it_speaks_a_part_of_redis(self):
        store = self.store
        self.assertTrue(store.set('a', b'1\n2', ex=10, nx=True))
        self.assertIsNone(store.set('a', b'2', ex=10, nx=True))
        self.assertEqual(store.get('a'), b'1\n2')
        self.assertEqual(FileStore(self.folder).get('b'), None)
        self.now[0] += 10
        self.assertIsNone(store.get('a'))
        self.assertTrue(store.set('a', b'4', nx=True))
        self.assertEqual((store.delete('a'), store.delete('a')), (1, 0))

    def test_what_it_takes_it_gives_back_however_large(self):
        for size in 0, 1 << 20, 3 << 20:
            self.assertTrue(self.store.set('a', b'x' * size))
            self.assertEqual(len(self.store.get('a')), size)

    def test_only_we_can_read_it_and_names_tell_nothing(self):
        self.store.set('token of wwx', b'x')
        path, = self.files()
        self.assertNotIn('token', path[len(self.folder):])
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o700)
        os.chmod(path, 0o644)
        with self.assertLogs('easywechat', 'WARNING'):
            self.assertIsNone(self.store.get('token of wwx'))
        os.rename(path, path + 'x')
        os.symlink(path + 'x', path)
        self.assertIsNone(self.store.get('token of wwx'))

    def test_a_clock_that_jumps_does_no_harm(self):
        up = [500.0]                        # 开机以来
        self.store._clock = lambda: up[0]
        for jump in -61, -86400, 86400:
            with self.subTest(jump=jump):
                self.store.set('a', b'1', ex=7200)
                self.now[0] += jump
                self.assertEqual(self.store.get('a'), b'1')
                self.assertIsNone(self.store.set('a', b'2', ex=7200, nx=True))
                up[0] += 7201
                self.now[0] += 7201 + 86400
                self.assertIsNone(self.store.get('a'))
        self.store.set('a', b'3', ex=7200)
        up[0], self.now[0] = 3.0, self.now[0] + 7100        # 重启了：只有墙上的钟
        self.assertEqual(self.store.get('a'), b'3')
        self.now[0] += 101
        self.assertIsNone(self.store.get('a'))

    def test_damaged_files_are_as_good_as_none_and_leftovers_go(self):
        self.store.set('a', b'12345', ex=7200)
        path, = self.files()
        with open(path, 'rb') as f:
            data = f.read()
        for n in range(len(data)):
            with open(path, 'wb') as f:
                f.write(data[:n])
            self.assertIsNone(self.store.get('a'))
        with open(path + '.1.1.tmp', 'wb') as f:
            f.write(data)               # 没有来得及改名的，里面是好的
        self.now[0] += 86400
        self.store.set('b', b'1')
        self.assertEqual(len(self.files()), 1)
        self.assertFalse([n for n in os.listdir(self.folder) if n.endswith('.tmp')])

    def test_what_others_can_read_is_not_ours(self):
        self.store.set('a', b'1')
        path, = self.files()
        os.chmod(path, 0o640)
        with self.assertLogs('easywechat', 'WARNING'):
            self.assertIsNone(self.store.get('a'))

    def test_a_write_that_fails_leaves_nothing(self):
        self.store.set('a', b'1')
        path, = self.files()
        os.unlink(path)
        os.mkdir(path)
        self.assertRaises(OSError, self.store.set, 'a', b'2')
        self.assertEqual([n for n in os.listdir(self.folder) if n.endswith('.tmp')], [])

    def test_of_many_who_claim_one_wins(self):
        stores, wins, gate = [FileStore(self.folder) for _ in range(6)], [], threading.Barrier(6)

        def claim(store):
            for n in range(20):
                gate.wait(10)
                if store.set('%d' % n, b'-', ex=60, nx=True):
                    wins.append(n)
        threads = [threading.Thread(target=claim, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(wins), list(range(20)))

    def test_what_is_not_its_own_stays(self):
        os.makedirs(self.folder)
        for name in 'bot.py', 'a' * 40 + '.txt', '.hidden':
            with open(os.path.join(self.folder, name), 'w'):
                pass
        before = os.stat(self.folder).st_mode
        self.now[0] += 10 ** 6
        self.store.set('a', b'1')
        self.assertEqual(len(os.listdir(self.folder)), 4)
        self.assertEqual(os.stat(self.folder).st_mode, before)

    def test_without_a_disk_it_keeps_in_memory_and_says_so_once(self):
        disk = FileStore(os.path.join(SOURCE, 'no'))
        self.assertRaises(OSError, disk.set, 'a', b'1')
        store = easywechat._steady(disk, WeChatClient)
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertTrue(store.set('a', b'1'))
            self.assertEqual(store.get('a'), b'1')
            with disk.lock('a'):
                self.assertEqual(store.delete('a'), 1)
        self.assertEqual(len(logs.output), 1)

    def test_one_at_a_time(self):
        inside, most = [], []

        def enter():
            with FileStore(self.folder).lock('a'):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()
        threads = [threading.Thread(target=enter) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(most, [1] * 10)


# ---- 消息 Messages ----------------------------------------------------------------------------

#: 一段文字的零件：字、标点（全角的写成转义）、几个码点的一个字。
PIECES = [
    '告警', '磁盘', 'disk', 'error: x', '今天天气很好', '\uff0c', '\u3002', '\uff01', '\uff1f', '\uff1b', '\u3001',
    ', ', '. ', ' ', '\n', '\n\n', '中', '😀', '👨\u200d👩\u200d👧', '🇨🇳', '👍🏽', 'e\u0301', '\uff08说明\uff09',
    '\u201c好\u3002\u201d']
WHOLE = re.compile(
    'https://[!#-;=?-_a-~]+|<a [^>]*>[^<]*</a>|\\[看[^]]*\\]\\([^)]*\\)|👨\u200d👩\u200d👧|🇨🇳|👍🏽|e\u0301')


def long_text(rng):
    """随便一段长文字：有网址、标签、代码、表格、emoji。"""
    def words(most):
        return ''.join(rng.choice(PIECES) for _ in range(rng.randint(1, most)))

    def block():
        n = rng.randint(1, 60)
        return rng.choice((
            lambda: words(150), lambda: words(150),
            lambda: 'https://nas.example/%s?id=%d&x=%s' % ('p/' * n, n, 'q' * n),
            lambda: '<a href="https://e.x/%s">重试%s</a>' % ('t' * n, '一次' * n),
            lambda: '<font color="warning">%s</font>' % words(200),
            lambda: '[看%s](https://e.x/%s)' % ('这里' * n, 'u' * n),
            lambda: '\n```%s\n%s```\n' % (rng.choice(('', 'py')), 'x = [1, 2] # 说明\u3002\n\n' * n),
            lambda: '\n\n| 名 | 值 |\n|---|:-:|\n%s\n' % ''.join('| n%d | %s |\n' % (i, '值' * n) for i in range(n))))()
    return ' '.join(block() for _ in range(rng.randint(1, 25)))


def check_parts(case, text, limit):
    """分成的几段：够短，该完整的都完整，每一段自己读得懂，去掉补上的就是原文。"""
    def bare(text):
        text = re.sub(r'(?m)^```\w*$|^\| 名 \| 值 \|$|^\|---\|:-:\|$', '', text)
        return re.sub(r'\s|</?font[^>]*>', '', text)
    parts = list(easywechat._split_text(text, limit))
    for part in parts:
        case.assertLessEqual(len(part.encode('utf-8')), limit)
        case.assertEqual(len(re.findall('(?m)^```', part)) % 2, 0, part)
        case.assertEqual(part.count('<font'), part.count('</font>'), part)
        case.assertFalse(part.startswith('| n'), part)
    case.assertEqual(bare('\n'.join(parts)), bare(text))
    case.assertEqual([whole for part in parts for whole in WHOLE.findall(part)], WHOLE.findall(text))
    return parts


class MessageTests(unittest.TestCase):

    def made(self, result, kind='text'):
        """回调的返回值 → 官方 JSON 的 list。"""
        return [message for item in easywechat._flat(result) for message in easywechat._made(item, kind)]

    def reply(self, result, msg_type='text'):
        replies = []
        for message in self.made(result, msg_type):
            reply = easywechat._passive(message, 'li.lei', 'ww', 1700000000.9)
            replies.append({k: v for k, v in xml_to_dict(reply).items()
                            if k not in ('ToUserName', 'FromUserName', 'CreateTime')})
        return replies[0] if replies else None

    def test_every_passive_reply(self):
        card = {'CardType': 'vote', 'CheckBox': {'OptionList': [{'Id': 'a'}, {'Id': 'b'}]},
                'ButtonList': [{'Text': 'x'}, {'Text': 'y'}]}
        item = {'Title': 't', 'Url': 'https://e.x'}
        for given, kind, got in (
                (None, 'text', None), ([], 'text', None), ('hi', 'event', {'MsgType': 'text', 'Content': 'hi'}),
                ({'Content': 7}, 'image', {'MsgType': 'text', 'Content': '7'}),
                ({'MediaId': 'M', 'MsgId': '1'}, 'image', {'MsgType': 'image', 'Image': {'MediaId': 'M'}}),
                ({'MsgType': 'voice', 'Voice': {'MediaId': 'M'}}, 'text',
                 {'MsgType': 'voice', 'Voice': {'MediaId': 'M'}}),
                ({'MsgType': 'video', 'MediaId': 'M', 'Title': 't'}, 'text',
                 {'MsgType': 'video', 'Video': {'MediaId': 'M', 'Title': 't'}}),
                ({'Articles': [item, item]}, 'text',
                 {'MsgType': 'news', 'ArticleCount': '2', 'Articles': {'item': [item, item]}}),
                ({'Articles': {'item': item}}, 'text',
                 {'MsgType': 'news', 'ArticleCount': '1', 'Articles': {'item': item}}),
                ({'Button': {'ReplaceName': '已处理'}}, 'event',
                 {'MsgType': 'update_button', 'Button': {'ReplaceName': '已处理'}}),
                ({'TemplateCard': card}, 'event',
                 {'MsgType': 'update_template_card', 'TemplateCard': card})):
            self.assertEqual(self.reply(given, kind), got)

    def test_what_is_no_reply_is_a_type_error(self):
        for given in (7, b'x', [7], {'MsgType': 'file', 'MediaId': 'M'}, {'MsgType': 'image'},
                      {'MsgType': ['a']}, {'Articles': []}, {'Articles': [{}] * 9}, {'Articles': 'x'}):
            self.assertRaises(TypeError, self.reply, given)

    def test_a_long_text_is_split_where_it_reads_well(self):
        split = lambda text, limit=30: list(easywechat._split_text(text, limit))  # noqa: E731
        self.assertEqual(split('a' * 29 + '中'), ['a' * 29, '中'])
        self.assertEqual(split('甲' * 6 + '\n\n' + '乙' * 9), ['甲' * 6, '乙' * 9])
        self.assertEqual(split('甲' * 6 + '\n' + '乙' * 9), ['甲' * 6, '乙' * 9])
        self.assertEqual(split('甲' * 6 + '。' + '乙' * 9), ['甲' * 6 + '。', '乙' * 9])
        self.assertEqual(split('甲\n' + '乙' * 10), ['甲\n' + '乙' * 8, '乙' * 2])     # 太靠前的不用
        self.assertEqual(split('short\n'), ['short\n'])
        rng = random.Random(7)
        for _ in range(300):
            text = ''.join(rng.choice('a中😀\n。 ,') for _ in range(rng.randint(0, 300)))
            parts = split(text)
            self.assertTrue(all(0 < len(p.encode()) <= 30 for p in parts))
            self.assertEqual(re.sub(r'\s', '', ''.join(parts)), re.sub(r'\s', '', text))

    def test_what_must_stay_whole_does(self):
        url, link = 'https://nas.example/task?id=1&do=restart&host=nas-in-the-cellar', '<a href="https://e.x/y">重试一次</a>'
        clause = '今天天气很好适合出门走走'
        for what, text, begins, ends in (
                ('a URL', '告警' * 335 + ' ' + url + '\u3002' + '说明' * 100, url, ' '),
                ('a link', '告警' * 340 + link + '说明' * 100, link, '告警'),
                ('a font', '<font color="info">' + '告警' * 500 + '</font>', '<font color="info">', '</font>'),
                ('code', '```py\n' + 'line of code\n' * 200 + '```', '```py\nline', 'code\n```'),
                ('a table', '| 名 | 值 |\n|---|:-:|\n' + '| 1 | 2 |\n' * 300, '| 名 | 值 |\n|---|:-:|\n|', '| 1 | 2 |'),
                ('a flag', 'x' * 2044 + '🇨🇳' + 'x' * 99, '🇨🇳', 'x'),
                ('a family', 'x' * 2040 + PIECES[18] + 'x' * 99, PIECES[18], 'x'),
                *(('a clause', (clause + mark) * 100, clause, mark)
                  for mark in '\uff0c\u3002\uff01\uff1f\uff1b\u3001\uff1a')):
            with self.subTest(what):
                parts = check_parts(self, text, 2048)
                self.assertEqual(len(parts), 2)
                self.assertTrue(parts[1].startswith(begins), parts[1][:40])
                self.assertTrue(parts[0].endswith(ends), parts[0][-40:])
        self.assertEqual(''.join(easywechat._split_text('https://e.x/' + 'p' * 9000)), 'https://e.x/' + 'p' * 9000)

    def test_any_text_is_split_so_that_each_part_reads_well(self):
        rng = random.Random(5)
        for n in range(150):
            with self.subTest(n):
                check_parts(self, long_text(rng), rng.choice((700, 2048, 4096)))

    def test_splitting_takes_linear_time(self):
        for text in ('[', '<a ', '<font x>', '|', '|a\n|-|\n', '```\n', ' ', '\n', 'a\u0301', 'http://', '[a', '](x)'):
            with self.subTest(text):
                begin = time.process_time()
                list(easywechat._split_text('| a |\n' + text * (200000 // len(text)) + 'x|'))
                self.assertLess(time.process_time() - begin, 3)

    def test_everything_that_may_be_given_becomes_messages(self):
        path = pathlib.Path(SOURCE)
        items = self.made(['a', None, ('b', iter(['c'])), path, {'Content': 'd' * 3000},
                           {'msgtype': 'markdown', 'markdown': {'content': 'e' * 3000}}])
        self.assertEqual([i['text']['content'] for i in items[:3]], ['a', 'b', 'c'])
        self.assertEqual(items[3], {'msgtype': 'file', 'file': {'media_id': path}})
        self.assertEqual([len(i['text']['content']) for i in items[4:6]], [2048, 952])
        self.assertEqual([len(i['markdown']['content']) for i in items[6:]], [2048, 952])

    def test_a_passive_reply_becomes_official_json(self):
        build = lambda item, kind='text': self.made(item, kind)[0]  # noqa: E731
        self.assertEqual(build({'MediaId': 'M'}, 'image'), {'msgtype': 'image', 'image': {'media_id': 'M'}})
        self.assertEqual(build({'Articles': [{'Title': 't', 'PicUrl': 'p'}]}),
                         {'msgtype': 'news', 'news': {'articles': [{'title': 't', 'picurl': 'p'}]}})
        self.assertEqual(build({'MsgType': 'video', 'MediaId': 'M', 'Title': 't'}),
                         {'msgtype': 'video', 'video': {'media_id': 'M', 'title': 't'}})
        self.assertEqual(build({'Content': 'x'}), {'msgtype': 'text', 'text': {'content': 'x'}})
        card = {'CardType': 'text_notice', 'QuoteArea': {'Appid': 'a', 'QuoteText': 'q'}, 'CardAction': {
            'AppId': 'a', 'PagePath': 'p'}, 'HorizontalContentList': [{'KeyName': 'k', 'UserId': 'u', 'MediaId': 'm'}]}
        self.assertEqual(build({'TemplateCard': card})['template_card'], {
            'card_type': 'text_notice', 'quote_area': {'appid': 'a', 'quote_text': 'q'}, 'card_action': {
                'appid': 'a', 'pagepath': 'p'},
            'horizontal_content_list': [{'keyname': 'k', 'userid': 'u', 'media_id': 'm'}]})
        self.assertEqual(easywechat._camel_case(build({'TemplateCard': card})['template_card']), card)


# ---- 请求 Requests ----------------------------------------------------------------------------

#: 本机的证书：有效到 2120 年的、2020 年过期的，和它们的私钥。
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBZzCCAQ2gAwIBAgIBAzAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKJYaMmU4qJdqwuy
YAHnWHkGKbFd0mxDK+APdljC5SqXPPbONTBo1v0S01oAOM9k7SS/nb9j6awKUnL6
KFRR0UCjTjBMMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBRcvumhAhrwAmncCKG8IWTPlMqLhDAKBggqhkjOPQQD
AgNIADBFAiBD1Ee0z7yt/HHIxx14MvFVSx+7rx7bGwIJtJze2u29jQIhAKRmydPw
oJMmNlViyb4wGsEi2ZYq/17Zk7rfMt1/jBaj
-----END CERTIFICATE-----
"""
EXPIRED = """-----BEGIN CERTIFICATE-----
MIIBZjCCAQugAwIBAgIBAjAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwHhcNMjAwMTAxMDAwMDAwWhcNMjAwMjAxMDAwMDAwWjAUMRIwEAYDVQQDDAls
b2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASiWGjJlOKiXasLsmAB
51h5BimxXdJsQyvgD3ZYwuUqlzz2zjUwaNb9EtNaADjPZO0kv52/Y+msClJy+ihU
UdFAo04wTDAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDwYDVR0TAQH/BAUw
AwEB/zAdBgNVHQ4EFgQUXL7poQIa8AJp3AihvCFkz5TKi4QwCgYIKoZIzj0EAwID
SQAwRgIhAI1n02TVh9QX5Ca77RqSRMjVFpcJfVVHrexlok6nFpM9AiEAppzqDO2l
Kts1/zV0ZOVxbGwKAbac9prVRDVYrBTu3l0=
-----END CERTIFICATE-----
"""
PRIVATE_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg2D8jAFXSt1hJJH+s
2u1X6QyHwERWT1PdUh4dmWCh4AKhRANCAASiWGjJlOKiXasLsmAB51h5BimxXdJs
QyvgD3ZYwuUqlzz2zjUwaNb9EtNaADjPZO0kv52/Y+msClJy+ihUUdFA
-----END PRIVATE KEY-----
"""


class ClientCase(unittest.TestCase):
    """一个企业微信（`examples/simulator.py`）和连到它的 client;token 放在自己的目录里。"""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder, True)       # 后台也许还在写 token
        self.wecom = simulator.WeCom()
        self.url = self.wecom.start()
        self.addCleanup(self.wecom.stop)
        SECRETS.update(self.wecom.settings[k] for k in ('secret', 'robot', 'token', 'encoding_aes_key'))

    def make(self, cls=WeChatClient, **settings):
        settings = dict(self.wecom.settings, api_base=self.url, **settings)
        client = cls('test', store=FileStore(os.path.join(self.folder, 'cache')), **settings)
        client.waited = []
        client._sleep = client.waited.append
        return client

    def count(self, path):
        return self.wecom.calls.count(path)

    def file(self, name, size=100):
        path = pathlib.Path(self.folder, os.fsdecode(name.encode('utf-8')))     # LANG=C 时也是 UTF-8
        with open(str(path), 'wb') as f:
            f.write(os.urandom(size))
        return path


class RetryTests(ClientCase):

    def failing(self, *script):
        self.wecom.script('message/send', *script)
        with raises(APIError) as caught:
            self.make().send('x')
        return caught[0]

    def test_what_may_have_arrived_is_sent_once(self):
        error = self.failing('lost')
        self.assertEqual((error.errcode, error.maybe_sent), (504, True))
        self.assertIn('may have been delivered', str(error))
        self.assertEqual((len(self.wecom.messages), self.count('message/send')), (1, 1))

    def test_half_answers_html_and_early_ends_are_not_repeated(self):
        head = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n'
        for n, (script, code) in enumerate([
                ('close', 504), (b'', 504), (b'garbage\r\n\r\n', 504), (head + b'\r\n<html>', 502),
                (head + b'Content-Length: 99\r\n\r\n{"errcode":0}', 504), (head + b'\r\n[]', 502),
                (head + b'\r\n' + b'[' * 100000, 502), (head + b'\r\n{"errcode":"0"}', 502),
                (head + b'Transfer-Encoding: chunked\r\n\r\n5\r\nab', 504),
                (head + b'\r\n' + b'a' * (3 << 20), 504), (b'HTTP/1.1 301 M\r\nLocation: http://x/\r\n\r\n', 502),
                (b'HTTP/1.1 502 Bad\r\n\r\n<html>', 502), (b'HTTP/1.1 200 OK\r\n' + b'A: b\r\n' * 200, 504)]):
            error = self.failing(script)
            self.assertEqual((error.errcode, type(error)), (code, NetworkError), repr(script)[:60])
            self.assertEqual(error.maybe_sent, b' 301 ' not in bytes(script, 'ascii') if isinstance(script, str)
                             else b' 301 ' not in script, repr(script)[:60])
            self.assertEqual(self.count('message/send'), n + 1)
        self.assertEqual(self.wecom.messages, [])

    def test_a_call_ends_in_time_whatever_the_server_does(self):
        class Quick(WeChatClient):
            call_within = 0.3
        client = self.make(Quick)
        client.get_token()
        for script in 'hang', 'trickle':
            self.wecom.script('message/send', script)
            begin = time.monotonic()
            with raises(NetworkError) as caught:
                client.send('x')
            self.assertLess(time.monotonic() - begin, 1.3)
            self.assertTrue(caught[0].maybe_sent)

    def test_what_all_wait_for_fails_for_all_at_once(self):
        class Quick(WeChatClient):
            call_within = 0.6
        client, ended = self.make(Quick), []
        self.wecom.script('gettoken', *['hang'] * 50)
        begin = time.monotonic()

        def call():
            try:
                client.call('user/get', userid='zhangsan')
            except NetworkError:
                ended.append(time.monotonic() - begin)
        threads = [threading.Thread(target=call, daemon=True) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0, begin + 3 - time.monotonic()))
        self.assertEqual(len(ended), 10)
        self.assertLess(max(ended), 1.1)
        self.assertLessEqual(self.count('gettoken'), 2)

    def test_foreign_bytes_cost_no_time(self):
        # 许多正则和解析器在这样的字节上要平方的时间；没有 Content-Length，断开就是完了。
        client = self.make()
        client.get_token()
        half = [''.join(p) for p in ('"', '\\', '{', '[', '"\\', '\\"', '"{', '{"', '"[', '["', '\\{', '{\\',
                                     '\\[', '[\\', '{[', '[{')]
        table = [b'{"a": "' + b'\\"' * 29000, b'[' * 100000] + [
            (start + piece * (65536 // len(piece))).encode() for piece in half for start in ('', '{"a": "', '{"a":')]
        for body in table:
            self.wecom.script('user/get', b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n' + body)
            begin, used = time.monotonic(), time.process_time()
            with raises(NetworkError) as caught:
                client.call('user/get', userid='zhangsan')
            self.assertEqual(caught[0].errcode, 502)
            self.assertLess(time.process_time() - used, 0.5, body[:20])
            self.assertLess(time.monotonic() - begin, 1, body[:20])

    def test_a_code_without_words_is_an_error_like_any(self):
        client = self.make()
        self.wecom.script('user/get', {'errcode': 45009})
        self.wecom.script('message/send', *[{'errcode': 45009}] * 2)
        for method, argument in (client.call, 'user/get'), (client.send, 'x'):
            with raises(APIError) as caught:
                method(argument)
            self.assertEqual((type(caught[0]), caught[0].errcode), (APIError, 45009))
            self.assertIn('60 秒', str(caught[0]))
        self.assertEqual(client.send_media('text', 'x', 'lisi')['errcode'], 45009)

    def test_whatever_expires_in_says_the_token_is_kept(self):
        for n, seconds in enumerate((7200, 10 ** 16, 1e16, -1, True, '7200', 0, None, [1], 1.5)):
            with self.subTest(expires_in=seconds):
                client = self.make(secret='s%d' % n)
                self.wecom.script('gettoken', {'errcode': 0, 'access_token': 'T%d' % n, 'expires_in': seconds})
                before = self.count('gettoken')
                self.assertEqual([client.get_token() for _ in range(3)], ['T%d' % n] * 3)
                self.assertEqual(self.count('gettoken') - before, 1)

    def test_after_many_tokens_the_secret_is_still_unspeakable(self):
        client, secret, token = self.make(), self.wecom.settings['secret'], None
        for _ in range(200):
            token = client.get_token(stale=token)
        self.assertEqual(self.count('gettoken'), 200)
        self.wecom.script('user/get', {'errcode': 40013, 'errmsg': 'no %s of %s' % (token, secret)})
        with self.assertRaises(APIError) as caught:
            client.call('user/get')
        self.assertNotIn(secret, str(caught.exception))
        self.assertNotIn(token, str(caught.exception))

    def test_a_relay_that_breaks_secrets_in_two_tells_nobody(self):
        client, secret = self.make(), self.wecom.settings['secret']
        broken = secret[:9] + '\n' + secret[9:]
        self.wecom.script('user/get', {'errcode': 40013, 'errmsg': 'no ' + broken})
        self.wecom.script('message/send', {'errcode': 0, 'errmsg': 'ok', 'invaliduser': broken})
        with self.assertRaises(APIError) as caught:
            client.call('user/get')
        with self.assertLogs('easywechat', 'WARNING') as logs:
            client.send('x')
        for text in str(caught.exception), repr(caught.exception), logs.output[0]:
            self.assertIn('***', text)
            self.assertNotIn(secret[9:], text)
        for proxy in 'http://user:%s@' % secret, 'user:%s@' % secret, 'http://user:%s@:99999' % secret:
            with self.subTest(proxy=proxy), environment(http_proxy=proxy), raises(APIError) as caught:
                self.make().send('x')
            self.assertNotIn(secret, '%s %r' % (caught[0], caught[0]))

    def test_a_number_of_a_million_digits_costs_nothing(self):
        client = self.make()
        for text in b'{"errcode": %s}', b'{"errcode": 0, "x": -%s}', b'{"errcode": 1.%s}', b'{"errcode": 1e%s}':
            self.wecom.script('user/get', b'HTTP/1.1 200 OK\r\n\r\n' + text % (b'1' * 1000000))
            client.get_token()
            begin = time.process_time()
            with raises(NetworkError) as caught:
                client.call('user/get')
            self.assertEqual(caught[0].errcode, 502)
            self.assertLess(time.process_time() - begin, 1)

    @unittest.skipUnless(hasattr(os, 'register_at_fork'), 'Python 3.6 没有')
    def test_a_child_after_a_fork_has_threads_of_its_own(self):
        client = self.make()
        client.send('from the parent')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')         # 3.12 起：这个进程有几条线程
            pid = os.fork()
        if not pid:
            code = 1
            with contextlib.suppress(Exception):
                client.call_within = 3
                client.send('from the child')
                code = 0
            os._exit(code)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertEqual([m['text']['content'] for m in self.wecom.messages], ['from the parent', 'from the child'])

    def test_who_gave_up_before_the_connection_sends_nothing_later(self):
        class Quick(WeChatClient):
            call_within, tries = 0.1, 1
        client = self.make(Quick)
        client.get_token()
        connect, connected = socket.create_connection, threading.Event()

        def slow(*args, **kwargs):
            time.sleep(0.3)
            sock = connect(*args, **kwargs)
            connected.set()
            return sock
        with swapped(socket, 'create_connection', slow):
            with raises(NetworkError) as caught:
                client.send('x')
            self.assertFalse(caught[0].maybe_sent)
            connected.wait(5)
            time.sleep(0.1)
        self.assertEqual(self.wecom.messages, [])

    def test_no_answer_brings_a_secret_out(self):
        secret = self.wecom.settings['secret']
        self.wecom.script('gettoken', {'errcode': 40013, 'errmsg': 'x' * 380 + secret}, (
            b'HTTP/1.1 404 X\r\nContent-Type: text/' + secret.encode() + b'\r\n\r\n'))
        for client in self.make(), self.make():
            with raises(APIError) as caught:
                client.get_token()
            self.assertNotIn(secret[:12], str(caught[0]))
        with self.assertLogs('easywechat', 'ERROR') as logs:
            make_server(lambda msg: WeChatRobot('plantedS3cret', api_base='h')._file(None)).handle(*delivery(message()))
        self.assertNotIn(PLANTED, logs.output[0])
        store = FileStore(os.path.join(SOURCE, 'no'))
        self.wecom.script('gettoken', {'errcode': 40013, 'errmsg': 'x'})
        with self.assertLogs('easywechat', 'WARNING'), raises(APIError) as caught:
            WeChatClient('t', store=store, api_base=self.url, corpid='c', secret='s').get_token()
        self.assertEqual(len(caught), 1)        # 没有 cause，没有 context

    def test_a_busy_system_is_asked_three_times(self):
        busy = {'errcode': -1, 'errmsg': 'system busy'}
        client = self.make()
        self.wecom.script('message/send', busy, busy)
        self.assertEqual(client.send('x')['errcode'], 0)
        self.assertEqual((self.count('message/send'), client.waited), (3, [1, 2]))
        self.assertEqual(self.failing(busy, busy, busy).errcode, -1)

    def test_what_cannot_be_reached_is_tried_again(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            client = self.make()
            client.api_base = 'http://127.0.0.1:%d' % free.getsockname()[1]
            with raises(NetworkError) as caught:
                client.get_token()
        self.assertEqual((caught[0].errcode, caught[0].maybe_sent, client.waited), (503, False, [1, 2]))

    def test_an_old_token_is_replaced_and_the_message_sent_once(self):
        client, other = self.make(), self.make()
        client.send('1')
        self.wecom.expire_tokens()
        client.send('2')
        other.send('3')
        self.assertEqual((len(self.wecom.messages), self.count('gettoken')), (3, 2))

    def test_always_40014_is_two_sends_and_two_gettoken(self):
        error = self.failing(*[{'errcode': 40014, 'errmsg': 'invalid access_token'}] * 9)
        self.assertEqual(error.errcode, 40014)
        self.assertEqual((self.count('message/send'), self.count('gettoken')), (2, 2))

    def test_a_token_that_was_refused_as_40001_is_replaced_once(self):
        client, refusal = self.make(), {'errcode': 40001, 'errmsg': 'invalid credential, access_token is invalid'}
        client.send('1')
        media = client.upload(self.file('b.png'))
        for path, call in (('message/send', lambda: client.send('2')), ('media/get', lambda: client.download(media)),
                           ('media/upload', lambda: client.upload(self.file('a.png')))):
            before = self.count('gettoken')
            self.wecom.script(path, refusal)
            call()
            self.assertEqual((self.count('gettoken'), client.trusted), (before + 1, True), path)
        self.wecom.script('message/send', refusal, refusal)
        with raises(APIError) as caught:
            client.send('3')
        self.assertEqual((caught[0].errcode, caught[0].path, client.trusted), (40001, 'message/send', False))

    def test_a_wrong_secret_is_not_asked_again_and_again(self):
        client = self.make()
        client.settings['secret'] = PLANTED
        for _ in range(5):
            with raises(APIError) as caught:
                client.send('x')
            self.assertEqual((caught[0].errcode, caught[0].path), (40001, 'gettoken'))
        self.assertEqual(self.count('gettoken'), 1)

    def test_a_token_is_kept_a_little_shorter_than_it_lives(self):
        kept = []

        class Store(MemoryStore):
            def set(self, name, value, ex=None, nx=False):
                kept.append(ex)
                return super().set(name, value, ex, nx)
        WeChatClient('x', store=Store(), api_base=self.url, **self.wecom.settings).get_token()
        self.assertEqual(kept, [6900])

    def test_fifty_threads_and_eight_processes_fetch_one_token(self):
        slow, api = threading.Event(), self.wecom.api_gettoken

        def api_gettoken(*args):            # 慢得大家都来得及一起问
            slow.wait(0.7)
            return api(*args)
        self.wecom.api_gettoken = api_gettoken
        code = ('import sys, easywechat; easywechat.WeChatClient("x", api_base=%r, '
                'store=easywechat.FileStore(%r), **%r).send("x", to="lisi")'
                % (self.url, os.path.join(self.folder, 'cache'), self.wecom.settings))
        processes = [subprocess.Popen([sys.executable, '-c', code], cwd=HERE) for _ in range(8)]
        client = self.make()
        threads = [threading.Thread(target=client.get_token) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([p.wait(20) for p in processes], [0] * 8)
        self.assertEqual((self.count('gettoken'), len(self.wecom.messages)), (1, 8))


class TransportTests(ClientCase):

    def test_api_base_is_forgiving(self):
        for text, base in (('https://h', 'https://h'), ('h.x:8080/', 'https://h.x:8080'),
                           (' http://h/cgi-bin/ ', 'http://h'), ('h/a/b/cgi-bin', 'https://h/a/b'),
                           ('http://[::1]:80/', 'http://[::1]:80'), ('', easywechat._API_BASE)):
            self.assertEqual(self.make(**{'robot': ''}).__class__('t', api_base=text, corpid='c', secret='s')
                             .api_base, base)
        for text in 'ftp://h', 'http://u:p@h', 'http://h?x=1', 'http://', 'h h', 'h:99999':
            self.assertRaises(ConfigError, WeChatClient, 't', api_base=text, corpid='c', secret='s')
        client = self.make()
        client.api_base = self.url + '/relay'
        self.assertEqual(client.send('x')['errcode'], 0)

    def test_the_proxy_of_the_environment_is_used(self):
        self.wecom.hosts.add('nosuch.invalid')
        with environment(http_proxy=self.url):
            client = self.make()
            client.api_base = 'http://nosuch.invalid'
            self.assertEqual(client.send('x')['errcode'], 0)
        with environment(all_proxy=self.url):
            client = self.make()
            client.api_base = 'http://nosuch.invalid'
            self.assertEqual(client.send('x')['errcode'], 0)

    def test_a_socks_proxy_is_named(self):
        for variables in {'http_proxy': 'socks5://127.0.0.1:9'}, {'all_proxy': 'socks5h://127.0.0.1:9'}:
            with environment(**variables), raises(NetworkError) as caught:
                self.make().send('x')
            self.assertIn('SOCKS', str(caught[0]))
            with environment(no_proxy='127.0.0.1', **variables):
                self.make().send('x')

    def test_tls_is_verified_and_the_words_help(self):
        ssl = __import__('ssl')
        paths = {}
        for name, text in (('good', CERTIFICATE), ('expired', EXPIRED)):
            paths[name] = os.path.join(self.folder, name)
            with open(paths[name], 'w') as f:
                f.write(text + PRIVATE_KEY)
        for name, ca_file, host, words in (
                ('good', '', '127.0.0.1', 'ca_file'), ('expired', 'expired', '127.0.0.1', '时钟'),
                ('good', 'good', '127.0.0.2', '不是这个域名'), ('good', 'good', '127.0.0.1', None)):
            wecom = simulator.WeCom()
            wecom.settings = self.wecom.settings
            wecom.start(host)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(paths[name])
            wecom._server.socket = context.wrap_socket(wecom._server.socket, server_side=True)
            self.addCleanup(wecom.stop)
            client = self.make(ca_file=paths.get(ca_file, ''))
            client.api_base = 'https://%s:%d' % (host, wecom._server.server_address[1])
            if words is None:
                self.assertEqual(client.call('user/get', userid='lisi')['name'], '李四')
                continue
            wecom._server.handle_error = lambda *args: None
            with raises(NetworkError) as caught:
                client.get_token()
            self.assertIn(words, caught[0].hint, caught[0])
            self.assertFalse(caught[0].maybe_sent)

    def test_no_redirect_leads_to_a_lesser_scheme(self):
        ssl, path = __import__('ssl'), os.path.join(self.folder, 'good')
        with open(path, 'w') as f:
            f.write(CERTIFICATE + PRIVATE_KEY)
        secure = simulator.WeCom()
        secure.settings = self.wecom.settings
        secure.start('127.0.0.1')
        self.addCleanup(secure.stop)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        secure._server.socket = context.wrap_socket(secure._server.socket, server_side=True)
        client = self.make(ca_file=path)
        base = client.api_base = 'https://127.0.0.1:%d' % secure._server.server_address[1]
        image = b'HTTP/1.1 200 OK\r\nContent-Disposition: attachment; filename="a.png"\r\nContent-Length: 4\r\n\r\ndata'
        for where, good in (('%s/cgi-bin/media/get' % base, True), ('%s/x' % self.url, False),
                            ('/cgi-bin/media/get', True)):
            secure.script('media/get', ('HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n' % where).encode(), image)
            if good:
                client.download('M', self.folder)
                continue
            with raises(NetworkError) as caught:
                client.download('M', self.folder)
            self.assertIn('不加密的网址', str(caught[0]))
            secure.next_script('media/get')

    def test_what_is_missing_is_named(self):
        for key in 'corpid', 'secret':
            with raises(ConfigError) as caught:
                WeChatClient('t', **dict(self.wecom.settings, **{key: ''}))
            self.assertIn(key, str(caught[0]))
        with raises(ConfigError) as caught:
            client = self.make(ca_file='/nosuch')
            client.api_base = 'https://127.0.0.1:1'
            client.get_token()
        self.assertIn('/nosuch', str(caught[0]))
        with raises(ConfigError) as caught:
            self.make(agentid='', appid='').send('x')
        self.assertIn('agentid', str(caught[0]))


class FetchTests(unittest.TestCase):
    """`fetch`：别的网站，慢得没有个完的也在内。"""

    def serve(self, *pieces, pause=0.02, status=b'200 OK'):
        """→ 一个网站的地址：先是头部，然后一块一块地答，最后一块没完没了。"""
        def answer(handler):
            handler.wfile.write(b'HTTP/1.1 %s\r\nSet-Cookie: a=b\r\n\r\n' % status)
            for piece in pieces:
                handler.wfile.write(piece)
            while pause:
                handler.wfile.write(pieces[-1])
                time.sleep(pause)
        return stand_in(self, answer)

    def test_an_answer(self):
        with easywechat.fetch(self.serve(b'one\ntwo\n', b'three', pause=0)) as answer:
            self.assertEqual((answer.status, answer.headers['Set-Cookie']), (200, 'a=b'))
            self.assertEqual(answer.read(), b'one\ntwo\nthree')
        with easywechat.fetch(self.serve(b'one\ntwo\n', b'three', pause=0, status=b'404 No'), proxies={}) as answer:
            self.assertEqual((answer.status, list(answer)), (404, [b'one\n', b'two\n', b'three']))

    def test_its_limits_are_totals(self):
        for pieces in (b'a', b'line\n'), (b'', b'no end of it'):
            url, begin, lines = self.serve(*pieces), time.monotonic(), []
            with raises(NetworkError) as caught, easywechat.fetch(url, within=0.3) as answer:
                for line in answer:
                    lines.append(line)
            self.assertEqual(caught[0].errcode, 504)
            self.assertTrue(0.2 < time.monotonic() - begin < 2)
            with raises(NetworkError), easywechat.fetch(url, within=0.3) as answer:
                answer.read()
        url = self.serve(b'one\n', b'', pause=0.05)
        with raises(NetworkError) as caught, easywechat.fetch(url, idle=0.2) as answer:
            self.assertEqual(next(iter(answer)), b'one\n')
            list(answer)
        self.assertIn('no answer within 0.2 s', str(caught[0]))
        with raises(NetworkError), easywechat.fetch(self.serve(b'x' * 99, pause=0)) as answer:
            answer.read(98)
        with socket.socket() as silent:
            silent.bind(('127.0.0.1', 0))
            silent.listen(1)
            with raises(NetworkError), easywechat.fetch('http://127.0.0.1:%d' % silent.getsockname()[1], within=0.2):
                pass

    def test_requests_under_way_are_bounded(self):
        go = threading.Event()
        self.addCleanup(go.set)
        seen = []
        url = stand_in(self, lambda handler: seen.append(1) or go.wait(20))

        def ask():
            with contextlib.suppress(NetworkError), easywechat.fetch(url, within=20):
                pass
        threads = [threading.Thread(target=ask) for n in range(70)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(seen) < 64 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        self.assertEqual(len(seen), 64)
        go.set()
        for thread in threads:
            thread.join()

    def test_what_goes_wrong_inside_is_the_programs_own(self):
        with self.assertRaises(ZeroDivisionError), easywechat.fetch(self.serve(b'x', pause=0)):
            raise ZeroDivisionError
        with self.assertRaises(FileNotFoundError), easywechat.fetch(self.serve(b'x', pause=0)):
            open('/nosuch')
        for url in 'file:///etc/passwd', 'ftp://h/', 'http://', 'http://h:x', 'http://\n', 'x', 'http://[':
            with self.assertRaises(ValueError), easywechat.fetch(url):
                pass


# ---- 主动模式 Client --------------------------------------------------------------------------

class SendTests(ClientCase):

    def test_the_short_forms_and_every_official_type(self):
        client = self.make()
        jpg, mp4, amr, pdf = (self.file(n) for n in ('a.jpg', 'b.mp4', 'c.AMR', 'd.pdf'))
        self.assertTrue(client.send('你好 "😀"')['msgid'])
        for path, kind in (jpg, 'image'), (mp4, 'video'), (amr, 'voice'), (pdf, 'file'):
            client.send(path, to=['zhangsan', 'lisi'])
            self.assertEqual(self.wecom.messages[-1]['msgtype'], kind)
        media = {m['type']: i for i, m in self.wecom.media.items()}
        cards = [dict(c, main_title={'title': 't'}) for c in (
            {'card_type': 'text_notice', 'card_action': {'type': 1, 'url': 'https://e.x'}},
            {'card_type': 'news_notice', 'card_action': {'type': 1, 'url': 'https://e.x'},
             'card_image': {'url': 'https://e.x/p.png'}},
            {'card_type': 'button_interaction', 'task_id': 't1', 'button_list': [{'text': 'b', 'key': 'k'}]},
            {'card_type': 'vote_interaction', 'task_id': 't2', 'checkbox': {
                'question_key': 'q', 'option_list': [{'id': 'a', 'text': 'A'}]},
             'submit_button': {'text': 's', 'key': 'k'}},
            {'card_type': 'multiple_interaction', 'task_id': 't3', 'select_list': [{
                'question_key': 'q', 'option_list': [{'id': 'a', 'text': 'A'}]}],
             'submit_button': {'text': 's', 'key': 'k'}})]
        for message in [
                {'msgtype': 'text', 'text': {'content': 'x'}}, {'msgtype': 'markdown', 'markdown': {'content': '# x'}},
                {'msgtype': 'textcard', 'textcard': {'title': 't', 'description': 'd', 'url': 'https://e.x'}},
                {'msgtype': 'news', 'news': {'articles': [{'title': 't', 'url': 'https://e.x'}]}},
                {'msgtype': 'mpnews', 'mpnews': {'articles': [
                    {'title': 't', 'thumb_media_id': media['image'], 'content': '<p>x</p>'}]}},
                {'msgtype': 'miniprogram_notice', 'miniprogram_notice': {
                    'appid': 'wx1', 'title': '会议室预订', 'content_item': [{'key': 'k', 'value': 'v'}]}},
        ] + [{'msgtype': 'template_card', 'template_card': c} for c in cards]:
            client.send(message, party='2', safe=0)
            self.assertEqual(self.wecom.messages[-1][message['msgtype']], message[message['msgtype']])
        self.assertIs(type(self.wecom.messages[-1]['agentid']), int)
        self.assertEqual(self.wecom.messages[0]['touser'], 'zhangsan')
        self.assertEqual(self.wecom.messages[0]['text']['content'], '你好 "😀"')

    def test_long_text_arrives_in_order(self):
        text = '\n'.join('第 %d 行,磁盘满了。' % n for n in range(500))
        self.make().send([text, 'end'])
        parts = [m['text']['content'] for m in self.wecom.messages]
        self.assertEqual('\n'.join(parts), text + '\nend')
        self.assertTrue(all(len(p.encode()) <= 2048 for p in parts))

    def test_receivers_as_people_type_them(self):
        client = self.make()
        self.wecom.users.update(a='a', b='b')
        for who in ('a|b', 'a,b', 'a;b', 'a\uff0cb', 'a\uff1bb', 'a\u3001b', 'a\uff5cb', ' a , b ', ['a', 'b'], ['a,b'],
                    ('a', 'b')):
            client.send('x', to=who)
            self.assertEqual(self.wecom.messages[-1]['touser'], 'a|b', who)
        client = self.make(touser='a\uff0cb')
        client.send('x')
        self.assertEqual(self.wecom.messages[-1]['touser'], 'a|b')

    def test_nobody_is_never_everybody(self):
        client = self.make(touser='')
        for sender, kwargs in ((client, {}), (self.make(), {'to': ''}), (self.make(), {'to': []})):
            with raises(APIError) as caught:
                sender.send('x', **kwargs)
            self.assertEqual(caught[0].errcode, 82001)
        client.send({'msgtype': 'text', 'text': {'content': 'x'}, 'touser': 'lisi'})
        self.assertEqual(self.wecom.messages[-1]['touser'], 'lisi')
        for empty in '', [], None:
            with raises(APIError) as caught:
                client.send(empty, to='lisi')
            self.assertEqual(caught[0].errcode, 44004)

    def test_partial_failures_are_returned_and_logged(self):
        with self.assertLogs('easywechat', 'WARNING') as logs:
            answer = self.make().send('x', to='lisi|Nosuch')
        self.assertEqual(answer['invaliduser'], 'nosuch')
        self.assertIn('nosuch', logs.output[0])

    def test_refusals_say_what_to_do(self):
        self.wecom.trusted = False
        with raises(APIError) as caught:
            self.make().send('x')
        self.assertEqual((caught[0].errcode, caught[0].path), (60020, 'message/send'))
        self.assertIn('203.0.113.9', caught[0].hint)
        self.wecom.trusted = True
        self.wecom.script('message/send', {'errcode': 45009, 'errmsg': 'api freq out of limit'})
        with raises(APIError) as caught:
            self.make().send('x')
        self.assertIn('60 秒', caught[0].hint)

    def test_it_paces_itself_before_wecom_drops(self):
        client = self.make()
        for n in range(31):
            client.send(str(n), to='zhangsan')
        self.assertEqual([round(w) for w in client.waited], [60])
        client.send('other', to='lisi')
        self.assertEqual(len(client.waited), 1)
        waited, now = [], [100.0]
        pace = easywechat._Pace(waited.append)
        first = pace.wait(['a', 'b'], {60: 2}, lambda: now[0])
        first[0] = now[0] = 103         # 到得晚
        pace.wait(['a'], {60: 2}, lambda: now[0])
        now[0] = 161
        pace.wait(['a'], {60: 2}, lambda: now[0])
        pace.wait(['b'], {60: 2}, lambda: now[0])
        self.assertEqual(waited, [2])

    def test_the_time_a_message_takes_counts(self):
        now = [0.0]

        class Slow(WeChatClient):
            per_minute = 1

            def _authorized(self, *args, **kwargs):
                now[0] += 10
                return super()._authorized(*args, **kwargs)
        client = self.make(Slow)
        client._clock = lambda: now[0]
        client.send(['1', '2'], to='lisi')
        self.assertEqual(client.waited, [60])       # 从发到了的时候算起
        pace = client._pace
        for n in range(100):
            now[0] += 61
            pace.wait(['user%d' % n], {60: 1}, lambda: now[0])
        self.assertLess(len(pace._slots), 3)        # 一分钟以前的收件人不留着

    def test_the_legacy_methods_never_raise(self):
        client = self.make()
        self.assertEqual(client.send_media('text', {'content': 'x'}, 'lisi')['errcode'], 0)
        self.assertEqual(client.send_media('text', 'x', 'nosuch')['errcode'], 81013)
        media = client.upload_media('image', str(self.file('a.png')))
        self.assertEqual((media['errcode'], media['type']), (0, 'image'))
        self.assertEqual(client.send_media('image', media['media_id'], 'lisi')['errcode'], 0)
        self.assertEqual(client.upload_media('image', '/nosuch')['errcode'], -1)
        self.assertEqual(client.upload_media('image', None)['errcode'], -1)
        self.wecom.script('message/send', 'close')
        answer = client.send_media('text', 'x', 'lisi')
        self.assertEqual(answer['errcode'], -1)
        LOG.write(str(answer))

    def test_any_api_can_be_called(self):
        client = self.make()
        self.assertEqual(client.call('user/get', userid='zhangsan')['name'], '张三')
        client.call('/cgi-bin/menu/create', {'button': [{'type': 'click', 'name': '状态', 'key': 's'}]},
                    agentid=1000002)
        self.assertEqual(client.call('menu/get', agentid=1000002)['button'][0]['name'], '状态')
        self.assertRaises(ValueError, client.call, 'a?b')
        with raises(NetworkError) as caught:
            client.call('no/such')
        self.assertIn('no/such', caught[0].hint)
        self.assertEqual((caught[0].errcode, caught[0].maybe_sent), (502, False))


class MediaTests(ClientCase):

    def test_files_go_out_and_come_back(self):
        client = self.make()
        for name in ('照片.jpg', '引"号.png', 'a b;c=d.txt', '文' * 66 + '.x'):
            path = self.file(name, 70000)
            media_id = client.upload(path)
            self.assertEqual(self.wecom.media[media_id]['data'], path.read_bytes())
            self.assertEqual(self.wecom.media[media_id]['name'], name.replace('"', '%22'))
            folder = tempfile.mkdtemp(dir=self.folder)
            for _ in range(2):
                got = client.download(media_id, folder)
                self.assertEqual(got.read_bytes(), path.read_bytes())
            self.assertEqual(len(os.listdir(folder)), 2)

    def test_sizes_and_kinds_are_checked_before(self):
        client = self.make()
        for name, size, kind, errcode in (
                ('a.jpg', 5, None, 44001), ('a.gif', 9, 'image', 40005), ('a.jpg', 9, 'photo', 40004),
                ('a.amr', (2 << 20) + 1, 'voice', 40006), ('a.zip', (20 << 20) + 1, None, 40006)):
            with raises(APIError) as caught:
                client.upload(self.file(name, size), kind)
            self.assertEqual(caught[0].errcode, errcode)
        self.assertEqual(self.wecom.calls, [])
        client.send(self.file('big.mp4', (10 << 20) + 1))
        self.assertEqual(self.wecom.messages[-1]['msgtype'], 'file')
        self.assertRaises(FileNotFoundError, client.upload, os.path.join(self.folder, 'nosuch'))

    def test_a_download_stays_in_its_folder(self):
        client = self.make()
        head = b'HTTP/1.1 200 OK\r\nContent-Disposition: attachment; filename%s\r\n\r\ndata'
        for given, name in ((b'="../../x.txt"', 'x.txt'), (b'="/etc/passwd"', 'passwd'), (b'=".."', 'file'),
                            (b'="..\\\\a\x1b.txt"', 'a.txt'), (b"*=UTF-8''%E7%85%A7.jpg", '照.jpg'),
                            (b'=".bashrc"', 'bashrc'), (b'="CON.txt"', '_CON.txt'), (b'="a:b?.txt"', 'a_b_.txt'),
                            (b'="%s.jpg"' % ('长' * 100).encode(), '长' * 35 + '.jpg'),
                            (b'="json.py"', 'json.py_'), (b'="JSON.PYC"', 'JSON.PYC_'), (b'="a.so"', 'a.so_'),
                            (b'="x.sh"', 'x.sh_'), (b'="x.py. "', 'x.py_'), (b'="a.PTH"', 'a.PTH_'),
                            (b'="x.py_"', 'x.py_'),
                            (b'="run.bat"', 'run.bat_'), (b'="config.ini"', 'config.ini_'),
                            (b'="a.python"', 'a.python'),
                            (b"*=UTF-8''photo%E2%80%AEgpj.exe", 'photogpj.exe_'), (b"*=UTF-8''x.p%E2%80%8By", 'x.py_'),
                            (b'="%s.py"' % (b'a' * 300), 'a' * 107 + '.py_')):
            folder = tempfile.mkdtemp(dir=self.folder)
            self.wecom.script('media/get', head % given)
            got = client.download('M', folder)
            self.assertEqual((os.listdir(os.fsencode(folder)), got.read_bytes()),
                             ([name.encode('utf-8')], b'data'), repr(given))

    def test_a_downloaded_file_has_the_suffix_of_its_type(self):
        client = self.make()
        head = 'HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Disposition: attachment; filename="%s"\r\n\r\ndata'
        for kind, given, name in (('audio/amr', '.amr', 'voice.amr'), ('audio/amr', 'voice', 'voice.amr'),
                                  ('image/jpeg', '', 'M.jpg'), ('video/mp4; x=y', 'a.b.mp4', 'a.b.mp4'),
                                  ('text/plain', '扩充', '扩充'), ('image/png', '待删', '待删.png')):
            with self.subTest(given):
                self.wecom.script('media/get', (head % (kind, given)).encode())
                folder = tempfile.mkdtemp(dir=self.folder)
                self.assertEqual(os.path.basename(str(client.download('M', folder))), os.fsdecode(name.encode()))

    def test_bytes_and_file_objects_go_out_by_their_name(self):
        client, data = self.make(), os.urandom(100)
        named = io.BytesIO(data)
        named.name, named_at_its_end = 'cam.jpg', named
        named_at_its_end.seek(0, 2)
        with open(str(self.file('b.png')), 'rb') as f:
            for source, name, shown in ((data, 'a.png', 'a.png'), (io.BytesIO(data), 'x/b.png', 'b.png'),
                                        (named_at_its_end, None, 'cam.jpg'), (f, None, 'b.png'),
                                        (f, '照.png', '照.png')):
                with self.subTest(shown):
                    media = self.wecom.media[client.upload(source, name=name)]
                    self.assertEqual((media['type'], media['name'], len(media['data'])), ('image', shown, 100))
            client.send(named)
            client.send([f])
            self.assertEqual([m['msgtype'] for m in self.wecom.messages], ['image', 'image'])
            self.assertFalse(f.closed)
        for wrong in data, io.BytesIO(data), io.StringIO('x'), None:
            with raises(TypeError):
                client.upload(wrong)
        with raises(TypeError) as caught:
            client.send(data)
        self.assertIn("name='photo.jpg'", str(caught[0]))

    def test_a_download_without_a_folder_is_nothing_that_python_imports(self):
        client = self.make()
        head = b'HTTP/1.1 200 OK\r\nContent-Disposition: attachment; filename="%s"\r\n\r\nraise SystemExit(7)'
        work, state = (os.path.join(self.folder, name) for name in ('work', 'state'))
        os.mkdir(work)
        with environment(XDG_STATE_HOME=state), working_in(work):
            for name in b'json.py', b'sitecustomize.py', b'json.so', b'json':
                self.wecom.script('media/get', head % name)
                got = client.download('M')
                self.assertEqual(str(got.parent), os.path.join(os.path.realpath(state), 'easywechat', 'downloads'))
            self.assertEqual(stat.S_IMODE(os.stat(str(got.parent)).st_mode), 0o700)
            self.assertEqual(os.listdir(work), [])
            for folder in work, str(got.parent):
                done = subprocess.run([sys.executable, '-c', 'import json; print(len(json.dumps(1)))'], cwd=folder,
                                      stdout=subprocess.PIPE)
                self.assertEqual((done.returncode, done.stdout.strip()), (0, b'1'))

    def test_a_file_that_changes_while_it_is_sent_is_not_sent(self):
        client, path = self.make(), str(self.file('a.bin', 300000))
        for what, change in ('longer', lambda f: f.write(b'x' * 100000)), ('shorter', lambda f: f.truncate(100000)):
            with self.subTest(what):
                def progress(sent, total, change=change):
                    self.assertLessEqual(sent, total)
                    if sent == 65536:
                        with open(path, 'ab') as f:
                            change(f)
                client.progress = progress
                with self.assertRaises(OSError) as caught:
                    client.send(pathlib.Path(path))
                self.assertEqual(caught.exception.errno, errno.EBUSY)
        self.assertEqual(self.wecom.messages, [])

    def test_a_failed_download_leaves_nothing(self):
        client = self.make()
        folder = tempfile.mkdtemp(dir=self.folder)
        head = b'HTTP/1.1 200 OK\r\nContent-Disposition: attachment; filename="x"\r\n'
        for script, code in ((None, 40007), (head + b'Content-Length: 9\r\n\r\nab', 504),
                             (b'HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\n\r\n', 504),
                             (b'HTTP/1.1 200 OK\r\n\r\n{}', 502)):
            self.wecom.script('media/get', script)
            with raises(APIError) as caught:
                client.download('M', folder)
            self.assertEqual((caught[0].errcode, os.listdir(folder)), (code, []))
        self.assertRaises(OSError, client.download, 'M', os.path.join(folder, 'nosuch'))

    def test_names_of_the_c_locale_are_decoded(self):
        client, path = self.make(), str(self.file('a.txt'))
        media_id = client.upload(path, name='备份.txt'.encode('utf-8').decode('ascii', 'surrogateescape'))
        self.assertEqual(self.wecom.media[media_id]['name'], '备份.txt')

    def test_progress_is_told(self):
        client, seen = self.make(), []
        client.progress = lambda sent, total: seen.append((sent, total))
        client.upload(self.file('a.bin', 200000))
        self.assertEqual(seen[-1], (200000, 200000))
        self.assertGreater(len(seen), 2)


class RobotTests(ClientCase):

    def robot(self, key=None):
        return WeChatRobot(key or self.wecom.settings['robot'], api_base=self.url)

    def test_every_type(self):
        robot = self.robot()
        robot.send('构建失败', mention='@all|13800000000')
        self.assertEqual(self.wecom.robot_messages[0]['text'], {
            'content': '构建失败', 'mentioned_list': ['@all'], 'mentioned_mobile_list': ['13800000000']})
        for message in ({'msgtype': 'markdown', 'markdown': {'content': 'x' * 4000}},
                        {'msgtype': 'markdown_v2', 'markdown_v2': {'content': '| a |'}},
                        {'msgtype': 'news', 'news': {'articles': [{'title': 't', 'url': 'https://e.x'}]}},
                        {'msgtype': 'template_card', 'template_card': {
                            'card_type': 'text_notice', 'main_title': {'title': 't'},
                            'card_action': {'type': 1, 'url': 'https://e.x'}}}):
            robot.send(message)
            self.assertEqual(self.wecom.robot_messages[-1], message)
        for name, kind in ('a.png', 'image'), ('b.amr', 'voice'), ('c.zip', 'file'), ('d.mp4', 'file'):
            robot.send(self.file(name))
            self.assertEqual(self.wecom.robot_messages[-1]['msgtype'], kind)

    def test_a_whole_webhook_keeps_its_host(self):
        key = self.wecom.settings['robot']
        for webhook in '%s/cgi-bin/webhook/send?key=%s', '%s/cgi-bin/webhook/send?a=b&key=%s&c=d#e':
            WeChatRobot(webhook % (self.url, key), api_base='https://nosuch.invalid').send('x')
        self.assertEqual(len(self.wecom.robot_messages), 2)
        for webhook, base in (('https://wework.corp.example:8443/p/cgi-bin/webhook/send?key=abcdefab',
                               'https://wework.corp.example:8443/p'),
                              ('qyapi.weixin.qq.com/cgi-bin/webhook/send?key=a', 'https://qyapi.weixin.qq.com'),
                              ('abcdefab', 'https://relay.example')):
            self.assertEqual(WeChatRobot(webhook, api_base='relay.example').api_base, base)

    def test_mentions(self):
        robot = self.robot()
        robot.send({'msgtype': 'markdown', 'markdown': {'content': 'x' * 4090}}, mention='zhangsan\uff0c@all')
        contents = [m['markdown']['content'] for m in self.wecom.robot_messages]
        self.assertEqual((contents[0][:21], ''.join(contents)[21:]), ('<@zhangsan><@all>\nxxx', 'x' * 4087))
        for message in self.file('a.png'), {'msgtype': 'markdown_v2', 'markdown_v2': {'content': 'x'}}:
            with raises(TypeError):
                robot.send(message, '@all')
        self.assertEqual(len(self.wecom.robot_messages), 2)

    def test_errors(self):
        for key in 'key=', 'a b', '中':
            with raises(ConfigError):
                self.robot(key)
        with raises(APIError) as caught:
            self.robot(PLANTED).send('x')
        self.assertEqual(caught[0].errcode, 93000)


# ---- 回调 Callbacks ---------------------------------------------------------------------------

class CallbackTests(unittest.TestCase):

    def test_blanks_around_a_text_match_no_pattern_and_hinder_none(self):
        server, seen = make_server(lambda msg: seen.append(msg['Content'])), []
        server.register_callback('text', lambda msg, what: seen.append((msg['Content'], what)), pattern='状态|查 (.+)')
        texts = ('状态', '状态 ', ' 状态', '\u3000状态\u200b', '\ufeff状态\xa0\n', '\t 状态\u2003', '查 a b ')
        for text in texts + ('状态x', 'x状态', '状 态', ' ', ''):
            server.handle(*delivery(message(Content=text)))
        self.assertEqual(seen, [(text, 'a b' if text[0] == '查' else None) for text in texts] + [
            '状态x', 'x状态', '状 态', ' ', ''])

    def test_only_the_people_in_touser_are_heard(self):
        users = 'zhangsan', 'lisi', 'w'
        with self.assertLogs('easywechat', 'DEBUG') as log:
            for touser, heard in ('ZhangSan|lisi', users[:2]), ('@all', users), ('', ()):
                seen = []
                server = make_server(seen.append, touser=touser, only_touser=True)
                for user in users:
                    reply = opened(server.handle(*delivery(message(FromUserName=user, Content='x')))[2]) or {}
                    self.assertEqual(reply.get('Content'),
                                     None if user in heard else server.refusal.replace('%s', user))
                    event = message(FromUserName=user, MsgType='event', Event='enter_agent')
                    self.assertEqual(server.handle(*delivery(event))[2], b'')
                self.assertEqual([msg['FromUserName'] for msg in seen], [user for user in heard for _ in range(2)])
        self.assertEqual([r.getMessage() for r in log.records if r.levelname == 'WARNING'], [
            'refused %s：不在 touser 里' % user for user in ('w', 'zhangsan', 'lisi', 'w')])
        for kind, found in ('event', True), ('text', False):        # 没有人的：智能机器人断开了
            func = server._callback_for({'MsgType': kind, 'Event': 'disconnected_event', 'FromUserName': ''})[0]
            self.assertEqual(func == seen.append, found)
        server.refusal = ''
        self.assertEqual(server.handle(*delivery(message(Content='x')))[2], b'')
        seen = []
        make_server(seen.append, touser='zhangsan').handle(*delivery(message(FromUserName='w')))
        self.assertEqual(len(seen), 1)

    def test_begin_and_end_of_a_callback_are_in_the_log(self):
        def callback(msg):
            if msg['Content'] == 'raise':
                raise KeyError(msg['Content'])
            return {'none': None, 'two': ['a', 'b'], 'gen': iter(['a'])}.get(msg['Content'])
        server = make_server()
        server.register_callback('text', callback)
        for text, count in ('none', 0), ('two', 2), ('gen', 1), ('raise', 0):
            with self.assertLogs('easywechat', 'DEBUG') as log:
                msg = message(Content=text)
                server.handle(*delivery(msg))
            lines = [r.getMessage() for r in log.records if r.msg.startswith('callback %s ')]
            self.assertRegex(lines[0], 'callback .*callback begins on text [0-9]+ from li.lei$')
            self.assertRegex(lines[-1], 'callback .*callback ended on text [0-9]+ from li.lei: %d results$' % count)
        with self.assertLogs('easywechat', 'DEBUG') as log:
            server.handle(*delivery(message(MsgType='image', MediaId='M', MsgId='7')))
        self.assertEqual([r.getMessage() for r in log.records if 'callback' in r.msg], [
            'no callback for image 7 from li.lei'])

    def test_the_server_is_its_own_wsgi_callable(self):
        server = make_server()
        self.assertIs(server.app, server)
        with open(SOURCE, encoding='utf-8') as f, open(os.path.join(HERE, 'README.md'), encoding='utf-8') as readme:
            text = f.read() + readme.read()
        self.assertIn('bot:server', text)
        self.assertNotIn('bot:server.app', text)        # gunicorn 20 起不收


# ---- 一次 Once --------------------------------------------------------------------------------

class Hasty(WeChatServer):
    """各种时限缩成十分之一。"""
    answer_within, hold_within, lease = 0.45, 0.6, 0.3


class Hastier(Hasty):
    answer_within, hold_within = 0.15, 0.2


class HastyCase(ClientCase):
    """企业微信等 5 秒、投递三次（这里都缩成十分之一）。"""

    def setUp(self):
        super().setUp()
        self.wecom.patience = 0.5

    def server(self, callback, store=None, cls=Hasty, **settings):
        server = cls('test', store=store, **dict(self.wecom.settings, api_base=self.url, **settings))
        server.register_callback('*', callback)
        host, port = server.start('127.0.0.1', 0)
        self.addCleanup(server.stop)
        return server, 'http://%s:%d/weixin' % (host, port)

    def ask(self, url, message, answers):
        answers.append(self.wecom.deliver(url, message))

    def see(self, user, count):
        """等用户看到 ``count`` 条。"""
        deadline = time.monotonic() + 10
        while len(self.wecom.inbox[user]) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)                # 多出来的也等一等
        return [content for _, content in self.wecom.inbox[user]]

    def users(self, count):
        """这么多个成员的账号。"""
        names = ['user%d' % n for n in range(count)]
        self.wecom.users.update(zip(names, names))
        return names

    def wait_for(self, condition):
        """等到 ``condition()``，至多五秒 → 它的值。"""
        deadline = time.monotonic() + 5
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        return condition()

    def at_once(self, job, arguments):
        """每个参数一条线程 ``job(参数)`` → 线程，已经开始了。"""
        threads = [threading.Thread(target=job, args=(argument,), daemon=True) for argument in arguments]
        for thread in threads:
            thread.start()
        return threads


class OnceTests(HastyCase):
    """回调只跑一次，用户每条只看到一次，不乱。"""

    def test_a_fourth_delivery_lets_the_first_go(self):
        go, answers, begun = threading.Event(), {}, threading.Event()
        self.addCleanup(go.set)
        server = make_server(lambda msg: begun.set() or go.wait(5) and 'x', type('Server', (WeChatServer,), {}))
        request = delivery(message())

        def ask(n):
            answers[n] = server.handle(*request)[0]
        threads = self.at_once(ask, [1])
        begun.wait(5)
        for n in 2, 3, 4:
            time.sleep(0.05)
            threads += self.at_once(ask, [n])
        self.assertEqual((self.wait_for(lambda: dict(answers)), go.is_set()), ({1: 503}, False))
        go.set()
        for thread in threads:
            thread.join(5)
        self.assertEqual(answers, {1: 503, 2: 200, 3: 200, 4: 200})

    def test_a_delivery_that_meets_a_run_given_up_starts_anew(self):
        inside, go = threading.Event(), threading.Event()

        class Store(MemoryStore):
            def delete(self, name):         # 作废的记录，删得慢
                inside.set()
                go.wait(5)
                return super().delete(name)
        busy, runs, answers = threading.Event(), [], []

        def callback(msg):
            runs.append(msg['Content'])
            return busy.wait(5) and 'x'
        server = make_server(callback, type('Server', (Hastier,), {'max_callbacks': 1}))
        server.store = Store()
        first, second = delivery(message(Content='1')), delivery(message(Content='2', FromUserName='b'))
        threads = self.at_once(lambda request: server.handle(*request), [first])
        self.wait_for(lambda: runs)
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertEqual(server.handle(*second)[0], 503)        # 轮不到
            self.assertTrue(inside.wait(5))
        busy.set()
        threads += self.at_once(lambda request: answers.append(server.handle(*request)[0]), [second])
        time.sleep(0.05)
        go.set()
        self.assertTrue(self.wait_for(lambda: answers))
        for thread in threads:
            thread.join(5)
        self.assertEqual((answers, runs), ([200], ['1', '2']))

    def test_what_waits_for_a_run_goes_when_it_ends(self):
        go = threading.Event()
        self.addCleanup(go.set)
        server, url = self.server(lambda msg: go.wait(5) and None if msg['Content'] == '1' else ['a', 'b'],
                                  cls=type('Server', (WeChatServer,), {'lease': 30, 'answer_within': 30}))
        self.wecom.deliveries = 1
        threads = self.at_once(lambda text: self.wecom.deliver(url, Content=text), ['1'])
        self.wait_for(lambda: server._once._runs)
        threads += self.at_once(lambda text: self.wecom.deliver(url, Content=text), ['2'])
        time.sleep(0.2)
        self.assertEqual(self.wecom.inbox['zhangsan'], [])
        begin = time.monotonic()
        go.set()
        self.assertEqual(self.see('zhangsan', 2), ['a', 'b'])       # 看时间的线程还睡着
        self.assertLess(time.monotonic() - begin, 2)

    def test_every_speed_with_and_without_secret(self):
        store = FileStore(os.path.join(self.folder, 'cache'))
        rows = [(seconds, kind, secret) for seconds in (0.01, 0.6, 1.2, 2.0)
                for kind in ('text', 'event', 'five') for secret in (True, False)
                if secret or (seconds < 2 and kind != 'five')]      # 两秒是第三次投递以后了
        runs, threads = [], []

        def callback(msg):
            seconds, kind, user = float(msg['Label']), msg['Kind'], msg['FromUserName']
            runs.append(user)
            if kind == 'five':
                def five():
                    for n in range(5):
                        time.sleep(seconds / 5)
                        yield '%s %d' % (user, n)
                return five()
            time.sleep(seconds)
            return user
        _, able = self.server(callback, store=store)
        _, unable = self.server(callback, secret='')
        for n, (seconds, kind, secret) in enumerate(rows):
            user = 'user%d' % n
            self.wecom.users[user] = user
            fields = {'MsgType': 'event', 'Event': 'click', 'EventKey': 'k'} if kind == 'event' else {}
            threads.append(threading.Thread(target=self.wecom.deliver, args=(able if secret else unable,), kwargs=dict(
                fields, user=user, Label=str(seconds), Kind=kind)))
            threads[-1].start()
        for n, (seconds, kind, secret) in enumerate(rows):
            user = 'user%d' % n
            expected = ['%s %d' % (user, i) for i in range(5)] if kind == 'five' else [user]
            self.assertEqual(self.see(user, len(expected)), expected, (seconds, kind, secret))
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(runs), sorted('user%d' % n for n in range(len(rows))))

    def test_what_is_pushed_comes_in_the_order_of_the_questions(self):
        def callback(msg):
            time.sleep(float(msg['Content']))
            return msg['Content']
        server, url = self.server(callback)
        server.client.get_token()
        begin = time.monotonic()
        threads = []
        for user, seconds in (('lisi', '1.2'), ('lisi', '0.7'), ('lisi', '0.8'), ('wangwu', '0.5')):
            threads.append(threading.Thread(target=self.wecom.deliver, args=(url,),
                                            kwargs={'user': user, 'Content': seconds}))
            threads[-1].start()
            time.sleep(0.03)
        self.assertEqual(self.see('wangwu', 1), ['0.5'])
        self.assertLess(time.monotonic() - begin, 1.1)      # 没有等 lisi 的
        self.assertEqual(self.see('lisi', 3), ['1.2', '0.7', '0.8'])
        for thread in threads:
            thread.join()

    def test_a_repeat_at_another_worker_gets_the_same_answer(self):
        for store in FileStore(os.path.join(self.folder, 's')), Redis():
            runs = []

            def callback(msg, runs=runs):
                runs.append(1)
                time.sleep(0.2)
                return 'x%d' % len(runs)
            urls = [self.server(callback, store, secret='')[1] for _ in range(2)]
            message = self.wecom.message()
            answers = []
            threads = [threading.Thread(target=self.ask, args=(url, message, answers)) for url in urls * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(([a['Content'] for a in answers], runs), (['x1'] * 4, [1]))

    def test_a_dead_worker_is_replaced_a_living_one_is_not(self):
        store, runs = Redis(), []
        server, url = self.server(lambda msg: runs.append(msg) or 'here', store, secret='')
        message = self.wecom.message()
        name = server._keys.of({k: str(v) for k, v in message.items()})
        store.set(name, b'-', ex=0.3, nx=True)          # 认领以后就死了
        self.assertEqual(self.wecom.deliver(url, message)['Content'], 'here')
        other = self.wecom.message()
        name = server._keys.of({k: str(v) for k, v in other.items()})
        store.set(name, b'-', ex=60, nx=True)           # 还活着
        self.assertIsNone(self.wecom.deliver(url, other))
        self.assertEqual(len(runs), 1)

    def test_the_third_delivery_outlasts_the_second(self):
        store = Redis()
        server, url = self.server(print, store, secret='')
        message = self.wecom.message()
        name = server._keys.of({k: str(v) for k, v in message.items()})
        store.set(name, b'-', ex=60, nx=True)           # 别的进程在跑，跑 1.2 秒
        reply = dict_to_xml({'MsgType': 'text', 'Content': 'late'}).encode()
        threading.Timer(1.2, store.set, (name, b'+' + reply)).start()
        self.assertEqual(self.wecom.deliver(url, message)['Content'], 'late')

    def test_a_store_that_fails_silences_nothing(self):
        store = Redis()
        server, url = self.server(lambda msg: msg['Content'], store, secret='')
        server.store.retry_after = 0.05
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for n in range(30):
                store.broken = 10 <= n < 20
                message = self.wecom.message(Content=str(n))
                for _ in range(2):
                    self.assertEqual(self.wecom.deliver(url, message)['Content'], str(n))
                time.sleep(0.01)
        self.assertEqual([line.split(':')[0] for line in logs.output], ['ERROR', 'WARNING'])

    def test_stop_waits_and_what_comes_is_still_pushed(self):
        server, url = self.server(lambda msg: time.sleep(0.9) or 'in time')
        server.client.get_token()
        server.client.trusted = True
        self.wecom.deliver(url)                 # 得到空的 200
        server.stop()
        self.assertEqual(self.wecom.inbox['zhangsan'], [('text', 'in time')])

    def test_stop_waits_under_wsgi_too(self):
        server, url = self.server(lambda msg: time.sleep(0.7) or 'in time')
        server.client.trusted = True
        query, body = self.wecom.request(self.wecom.message())
        self.assertEqual(ask_wsgi(server, 'POST', '/weixin?' + query, body)[::2], (200, b''))
        server.finish(time.monotonic() + 5)
        self.assertEqual(self.wecom.inbox['zhangsan'], [('text', 'in time')])

    def test_a_bad_result_does_not_stop_the_next(self):
        results = iter([['a', {'MsgType': 'image', 'Image': 3}, {'Articles': [1]}, 'b'], ['c', 'd']])
        server, url = self.server(lambda msg: next(results))
        with self.assertLogs('easywechat', 'ERROR'):
            self.wecom.deliver(url)
            self.wecom.deliver(url)
            self.assertEqual([c for c in self.see('zhangsan', 4)], ['a', 'b', 'c', 'd'])

    def test_an_error_of_the_store_leaves_nothing_behind(self):
        store = MemoryStore()
        server, url = self.server(lambda msg: '你好', store)
        message = self.wecom.message()

        def broken(*args, **kwargs):
            raise RuntimeError('x')
        store.set = broken
        query, body = self.wecom.request(message)
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertEqual(server.handle('POST', '/weixin?' + query, body)[0], 503)
        del store.set
        self.assertEqual(self.wecom.deliver(url, message)['Content'], '你好')
        server.stop()
        self.assertEqual(server._once._runs, {})

    def test_what_waits_for_a_turn_is_not_answered_before_it_runs(self):
        class Small(Hastier):
            max_callbacks = 1
        go, runs = threading.Event(), []
        server = make_server(lambda msg: runs.append(msg['Content']) or go.wait(10) and 'ok', Small,
                             secret='s', api_base=self.url)
        server.client.trusted = True
        first, second = message(Content='1'), message(Content='2')
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertEqual(server.handle(*delivery(first))[0], 200)       # 空的：有了结果再发
            self.assertEqual(server.handle(*delivery(second))[0], 503)      # 没有跑：企业微信再来
        go.set()
        self.assertEqual(opened(server.handle(*delivery(second))[2])['Content'], 'ok')
        self.assertEqual(runs, ['1', '2'])

    def test_a_stalled_store_delays_no_answer(self):
        for secret, expected in ('', 503), ('s', 200):
            store = Redis()
            server = make_server(lambda msg: time.sleep(0.4) or 'x', Hastier, secret=secret, api_base=self.url,
                                 store=store)
            if secret:
                server.client.trusted = True
            store.stalled = lambda method, nx=None, **kwargs: method == 'set' and not nx
            begin = time.monotonic()
            self.assertEqual(server.handle(*delivery(message()))[0], expected)
            self.assertLess(time.monotonic() - begin, 0.35)
            store.go_on.set()
            server.stop()

    def test_a_store_that_hangs_takes_neither_the_server_nor_its_threads(self):
        store = Redis()
        self.addCleanup(store.go_on.set)
        store.stalled = lambda *args, **kwargs: True
        server, url = self.server(lambda msg: msg['Content'], store, secret='')
        server.store_within, server.hold_within = 0.4, 3
        host = urllib.parse.urlsplit(url)
        before, most, begin, held = threading.active_count(), 0, time.monotonic(), []
        with self.assertLogs('easywechat', 'ERROR') as logs:
            for n in range(64):
                query, body = self.wecom.request(self.wecom.message(Content=str(n)))
                held.append(socket.create_connection((host.hostname, host.port), 3))
                self.addCleanup(held[-1].close)
                held[-1].sendall(b'POST /weixin?%s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s' % (
                    query.encode(), len(body), body))
            self.assertEqual(ask_socket((host.hostname, host.port), 'GET', '/weixin')[0], 200)
            self.assertLess(time.monotonic() - begin, 0.9)
            most = threading.active_count() - before
            texts = []
            for sock in held:
                answer = b''.join(iter(lambda sock=sock: sock.recv(65536), b''))
                texts.append(self.wecom.opened(answer.partition(b'\r\n\r\n')[2]).get('Content'))
            self.assertLess(time.monotonic() - begin, 1.5)
        self.assertEqual(texts, [str(n) for n in range(64)])
        self.assertLess(most, 150)
        self.assertEqual(len(logs.output), 1)       # 说一次
        query, body = self.wecom.request(self.wecom.message(Content='0'))
        begin = time.monotonic()
        self.assertEqual(self.wecom.deliver(url, Content='later')['Content'], 'later')
        self.assertLess(time.monotonic() - begin, 0.39)

    def test_a_turn_comes_back_whatever_fails(self):
        class Broken(MemoryStore):
            def set(self, name, value, ex=None, nx=False):
                if value[:1] == b'+':
                    raise RuntimeError('x')
                return super().set(name, value, ex, nx)

        class Small(Hasty):
            max_callbacks = 2
        server = make_server(lambda msg: 'ok', Small, store=Broken())
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertEqual([server.handle(*delivery(message()))[0] for _ in range(4)], [200] * 4)

    def test_an_error_in_the_clock_does_not_stop_it(self):
        errors = []

        class Broken(Hastier):
            @property
            def hold_within(self):      # 看时间的线程第一次问的时候坏一次
                if threading.current_thread() is not threading.main_thread() and not errors:
                    errors.append(1)
                    raise RuntimeError('x')
                return 0.2
        server = make_server(lambda msg: time.sleep(0.5), Broken)
        with self.assertLogs('easywechat', 'ERROR'):
            begin = time.monotonic()
            self.assertEqual(server.handle(*delivery(message()))[0], 503)
        self.assertLess(time.monotonic() - begin, 0.45)

    def test_an_interrupt_goes_through(self):
        class Interrupted(MemoryStore):
            def claim(self, name, lease):
                raise KeyboardInterrupt
        server = make_server(lambda msg: 'x', Hasty)
        server.store, store = Interrupted(), server.store
        with self.assertRaises(KeyboardInterrupt):
            server.handle(*delivery(message(MsgId='7')))
        server.store = store            # 什么也没有留下
        self.assertEqual(opened(server.handle(*delivery(message(MsgId='7')))[2])['Content'], 'x')

    def test_what_stop_cuts_off_is_in_the_log(self):
        go = threading.Event()
        server, url = self.server(lambda msg: go.wait(10) and 'x')
        server.stop_within = 0.2
        thread = threading.Thread(target=self.wecom.deliver, args=(url,), kwargs={'MsgId': 4711})
        thread.start()
        while not server._once._runs:
            time.sleep(0.01)
        with self.assertLogs('easywechat', 'WARNING') as logs:
            server.stop()
        self.assertIn('消息 4711（zhangsan）', logs.output[0])
        go.set()
        thread.join()

    def test_a_slow_card_is_updated_actively(self):
        def callback(msg):
            time.sleep(0.6)
            return {'MsgType': 'update_template_card', 'TemplateCard': {
                'CardType': 'text_notice', 'MainTitle': {'Title': '好了'},
                'CardAction': {'Type': 2, 'AppId': 'a', 'PagePath': 'p'},
                'HorizontalContentList': [{'KeyName': 'k', 'UserId': 'u'}]}}
        server, url = self.server(callback)
        server.client.get_token()
        self.wecom.deliver(url, MsgType='event', Event='template_card_event', ResponseCode='RC', EventKey='k')
        deadline = time.monotonic() + 5
        while not self.wecom.updates and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual(self.wecom.updates, [{
            'userids': ['zhangsan'], 'response_code': 'RC', 'agentid': 1000002, 'template_card': {
                'card_type': 'text_notice', 'main_title': {'title': '好了'}, 'card_action': {
                    'type': 2, 'appid': 'a', 'pagepath': 'p'},
                'horizontal_content_list': [{'keyname': 'k', 'userid': 'u'}]}}])


#: 一个机器人，一个进程：参数是放 FileStore 的目录、记下每次运行的文件、别的设置。
#: 拿着 GIL 的时候，别的线程一次也轮不到。
WORKER = r"""
import json, os, signal, sys, time
import easywechat

class Worker(easywechat.WeChatServer):
    answer_within, hold_within, lease = 0.45, 0.6, 0.3

def hold_the_gil(seconds):
    sys.setswitchinterval(1000)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    sys.setswitchinterval(0.005)

def callback(msg):
    what, _, seconds = msg['Content'].partition(' ')
    with open(runs, 'a+') as f:
        f.seek(0)
        again = what in f.read()
        f.write('%s of %d\n' % (what, os.getpid()))
    if what == 'gil':
        hold_the_gil(float(seconds))
    elif not again:
        if what == 'fork' and not os.fork():
            time.sleep(3)
            os._exit(0)
        time.sleep(float(seconds))
    return '%s of %d' % (what, os.getpid())

folder, runs, settings = sys.argv[1:]
server = Worker('test', store=easywechat.FileStore(folder), **json.loads(settings))
server.register_callback('*', callback)
print(server.start('127.0.0.1', 0)[1], flush=True)
sys.stdin.read()
"""


@unittest.skipUnless(os.name == 'posix', 'FileStore 的锁是 POSIX 的')
class WorkerTests(HastyCase):
    """几个进程，一个 FileStore。"""

    def setUp(self):
        super().setUp()
        self.shared, self.runs = os.path.join(self.folder, 'store'), os.path.join(self.folder, 'runs')

    def workers(self, count):
        """→ [（进程，网址）]。"""
        settings = dict(self.wecom.settings, secret='')
        command = [sys.executable, '-c', WORKER, self.shared, self.runs, json.dumps(settings)]
        processes = [subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL) for _ in range(count)]
        for process in processes:
            self.addCleanup(process.stdout.close)
            self.addCleanup(process.stdin.close)
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
        return [(p, 'http://127.0.0.1:%d/weixin' % int(p.stdout.readline())) for p in processes]

    def ran(self, what):
        """哪几个进程跑过它，依次。"""
        with open(self.runs, 'a+') as f:
            f.seek(0)
            return [int(line.split()[2]) for line in f if line.split()[0] == what]

    def test_who_lives_is_not_replaced_who_died_is_at_once(self):
        # 拿着 GIL 不放的、停住的，几个租期那么久，还是它的；被杀了，下一次投递马上由别的进程接手。
        (busy, busy_url), (stopped, stopped_url), (other, url) = self.workers(3)
        self.wecom.patience = 0.8
        self.users(3)
        messages = {what: self.wecom.message('user%d' % n, Content=content) for n, (what, content) in enumerate(
            [('gil', 'gil 1.6'), ('stop', 'stop 1'), ('fork', 'fork 3')])}

        def deliver(job):
            self.wecom.deliver(job[0], messages[job[1]])
        threads = self.at_once(deliver, [(busy_url, 'gil'), (stopped_url, 'stop')])
        self.wait_for(lambda: self.ran('gil') and self.ran('stop'))
        stopped.send_signal(signal.SIGSTOP)
        threads += self.at_once(deliver, [(url, 'gil'), (url, 'stop')])
        time.sleep(1.5)
        self.assertEqual((self.ran('gil'), self.ran('stop')), ([busy.pid], [stopped.pid]))
        stopped.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join(5)
        self.assertEqual((self.ran('gil'), self.ran('stop')), ([busy.pid], [stopped.pid]))
        self.assertEqual([self.wecom.deliver(url, messages[what])['Content'] for what in ('gil', 'stop')], [
            'gil of %d' % busy.pid, 'stop of %d' % stopped.pid])        # 那边的答复，这边也有
        self.at_once(deliver, [(stopped_url, 'fork')])
        self.wait_for(lambda: self.ran('fork'))
        stopped.kill()                          # 它 fork 出来的还活着
        stopped.wait()
        begin = time.monotonic()
        reply = self.wecom.deliver(url, messages['fork'])
        self.assertEqual(reply['Content'], 'fork of %d' % other.pid)
        self.assertEqual(self.ran('fork'), [stopped.pid, other.pid])
        self.assertLess(time.monotonic() - begin, 0.7)

    def test_a_store_is_not_given_up_because_the_process_was_stopped(self):
        code = ("import time, easywechat\n"
                "class Slow(easywechat.MemoryStore):\n"
                "    def get(self, name):\n"
                "        print('asked', flush=True)\n"
                "        for _ in range(8): time.sleep(0.05)\n"
                "        return b'it'\n"
                "class Store:\n"
                "    get = Slow().get\n"
                "store = easywechat._steady(Store(), easywechat.WeChatClient)\n"
                "print(store.get('a'), flush=True)\n")
        process = subprocess.Popen([sys.executable, '-c', code], cwd=HERE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.3)                 # store_within 是 1 秒
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=10)
        self.assertEqual((out.split(), err), ([b"b'it'"], b''))

    def test_a_folder_that_is_removed_makes_no_second_run(self):
        urls = [url for _, url in self.workers(2)]

        def deliver(job):
            self.wecom.deliver(*job)
        for url in urls:
            self.wecom.deliver(url, Content='warm 0')
        slow = self.wecom.message('lisi', Content='slow 1.2')
        threads = self.at_once(deliver, [(urls[0], slow)])
        self.wait_for(lambda: self.ran('slow'))
        for n in range(3):
            while os.path.exists(self.shared):      # 跑着的会重新建
                shutil.rmtree(self.shared, ignore_errors=True)
            fresh = self.wecom.message(Content='fresh%d 0.1' % n)
            for thread in self.at_once(deliver, [(url, fresh) for url in urls * 2]):
                thread.join(5)
            self.assertEqual(len(self.ran('fresh%d' % n)), 1)
        time.sleep(0.2)                         # 跑着的，过一会儿又认领一遍
        self.wecom.deliver(urls[1], slow)
        for thread in threads:
            thread.join(5)
        self.assertEqual(len(self.ran('slow')), 1)
        self.assertEqual([text for _, text in self.wecom.inbox['lisi']][0][:4], 'slow')


class Redis:
    """redis-py 的三个方法，在内存里；可以坏掉。"""

    def __init__(self):
        self.store, self.broken, self.calls = MemoryStore(), False, 0
        self.stalled, self.go_on = None, threading.Event()

    def _do(self, method, *args, **kwargs):
        self.calls += 1
        if self.stalled and self.stalled(method, **kwargs):
            self.go_on.wait(20)
        if self.broken:
            raise ConnectionError('connection refused')
        return getattr(self.store, method)(*args, **kwargs)

    def get(self, name):
        return self._do('get', name)

    def set(self, name, value, ex=None, nx=False):
        return self._do('set', name, value, ex=ex, nx=nx)

    def delete(self, name):
        return self._do('delete', name)


# ---- 答复 Replies -----------------------------------------------------------------------------

class ReplyTests(ClientCase):
    """回调返回的不止一个 dict：被动回复一条，或主动发送几条。"""

    def server(self, callback, **settings):
        self.wecom.settings.update(SETTINGS)
        server = WeChatServer('test', store=FileStore(os.path.join(self.folder, 'cache')),
                              **dict(self.wecom.settings, api_base=self.url, **settings))
        server.register_callback('*', callback)
        return server

    def ask(self, server, **fields):
        """一次投递 → 被动回复；等回调跑完。"""
        status, _, body = server.handle(*delivery(message(FromUserName='lisi', **fields)))
        self.assertEqual(status, 200)
        server.finish(time.monotonic() + 10)
        return opened(body)

    def sent(self):
        self.assertEqual({m['touser'] for m in self.wecom.messages} | {'lisi'}, {'lisi'})
        return [m[m['msgtype']].get('content', m['msgtype']) for m in self.wecom.messages]

    def test_one_result_is_the_passive_reply(self):
        text = 'a msgtype'
        for result in text, [text], (text,), iter([text]), {'Content': text}, [None, text]:
            self.assertEqual(self.ask(self.server(lambda msg, result=result: result))['Content'], text)
        self.assertEqual(self.wecom.calls, [])

    def test_several_are_pushed_in_order(self):
        def several(msg):
            msg.clear()                 # 回调可以改它的 dict
            yield 'a'
            yield ['b', {'MsgType': 'news', 'Articles': [{'Title': 't', 'Url': 'https://e.x'}]}]
            yield self.file('c.pdf')
        self.assertIsNone(self.ask(self.server(several)))
        self.assertEqual(self.sent(), ['a', 'b', 'news', 'file'])

    def test_a_stream_is_paragraphs(self):
        text = '一\r\n二\n\n \n三\n\n```sh\na\n\n\nb\n```\n四\n\n~~~\n没有完\n\n尾'
        paragraphs = ['一\r\n二', '三', '```sh\na\n\n\nb\n```\n四', '~~~\n没有完\n\n尾']
        for size in 1, 2, 3, 100:
            pieces = [text[n:n + size] for n in range(0, len(text), size)]
            self.assertEqual([p.rstrip('\n') for p in Stream(pieces).paragraphs()], paragraphs)
        begin = time.process_time()
        self.assertEqual(len(list(Stream('字' * 300000).paragraphs())), 1)
        self.assertEqual(len(list(Stream('字\n' for _ in range(100000)).paragraphs())), 1)
        self.assertLess(time.process_time() - begin, 5)
        self.assertRaises(TypeError, easywechat.Stream, 5)
        self.assertRaises(TypeError, list, Stream([5]).paragraphs())

    def test_paragraphs_of_a_stream_are_joined_while_one_is_on_its_way(self):
        first, go = threading.Event(), threading.Event()

        def pieces():
            yield '一\n\n'
            first.wait(5)
            yield '二\n\n三\n\n' + '四' * 650 + '\n\n五'
            go.set()
        server = self.server(lambda msg: Stream(pieces()))
        send, server.client.trusted = server.client._authorized, True

        def slow(path, *args, **kwargs):
            first.set()
            go.wait(5)
            return send(path, *args, **kwargs)
        server.client._authorized = slow
        server.answer_within = 0.05
        self.ask(server)
        self.assertEqual('\n\n'.join(self.sent()), '一\n\n二\n\n三\n\n' + '四' * 650 + '\n\n五')
        self.assertEqual((self.sent()[0], len(self.sent()) < 5), ('一', True))

    def test_what_is_joined_still_fits_one_message(self):
        parcel = easywechat._Parcel.__new__(easywechat._Parcel)
        parcel.items = ['on its way']
        parcel.push([easywechat._message_of(easywechat._Paragraph(text), 'text') for text in (
            '二', '三', '四' * 679, '五')] + [easywechat._message_of('不是一段的', 'text')])
        self.assertEqual([m['text']['content'] for m in parcel.items[1:]],
                         ['二\n\n三\n\n' + '四' * 679, '五', '不是一段的'])

    def test_a_stream_where_nothing_can_be_pushed_is_one_reply(self):
        server = self.server(lambda msg: Stream(['一\n', '\n二']), secret='', agentid='')
        self.assertEqual(self.ask(server)['Content'], '一\n\n二')

    def test_a_stream_can_be_sent(self):
        server = self.server(lambda msg: None)
        server.client.send(Stream(['一\n\n', '二']), to='lisi')
        self.assertEqual(self.sent(), ['一', '二'])

    def test_long_text_is_pushed_in_parts(self):
        text = '\n'.join('第 %d 行' % n for n in range(500))
        self.assertIsNone(self.ask(self.server(lambda msg: text)))
        self.assertEqual('\n'.join(self.sent()), text)

    def test_a_picture_is_uploaded_and_replied(self):
        reply = self.ask(self.server(lambda msg: self.file('a.jpg')))
        self.assertEqual((reply['MsgType'], list(self.wecom.media)), ('image', [reply['Image']['MediaId']]))
        self.assertIsNone(self.ask(self.server(lambda msg: self.file('a.pdf'))))
        self.assertEqual(self.sent(), ['file'])
        card = {'msgtype': 'textcard', 'textcard': {'title': 't', 'description': 'd', 'url': 'https://e.x'}}
        self.assertIsNone(self.ask(self.server(lambda msg: card)))
        self.assertEqual(self.sent(), ['file', 'textcard'])

    def test_who_cannot_send_replies_with_the_texts_in_one(self):
        server = self.server(lambda msg: ['a', {'msgtype': 'text', 'text': {'content': 'b'}}, 'c'], secret='')
        self.assertEqual(self.ask(server)['Content'], 'a\n\nb\n\nc')
        markdown = {'msgtype': 'markdown', 'markdown': {'content': 'm'}}
        for more, left in (['x' * 2000, 'y' * 100], 1), (['a', markdown], 1):
            with self.assertLogs('easywechat', 'WARNING') as logs:
                reply = self.ask(self.server(lambda msg, more=more: more, secret=''))
            self.assertEqual((reply['Content'], len(logs.output)), (more[0], left))
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.assertIsNone(self.ask(self.server(lambda msg: self.file('a.jpg'), secret='')))
        self.assertIn('没有写 secret', logs.output[0])

    def test_after_an_untrusted_ip_it_replies_passively(self):
        self.wecom.trusted = False
        server = self.server(lambda msg: ['a', 'b'])
        self.assertEqual(self.ask(server)['Content'], 'a\n\nb')      # 问过了，不能发
        self.assertEqual(self.wecom.calls, ['gettoken', 'agent/get'])
        self.wecom.trusted = server.client.trusted = True
        self.wecom.script('message/send', *[{'errcode': 60020, 'errmsg': 'x'}] * 2)
        with self.assertLogs('easywechat', 'ERROR') as logs:        # IP 刚刚变了：第一条还来得及
            self.assertEqual(self.ask(server, MsgId='77')['Content'], 'a')
        self.assertIn('not pushed to lisi：消息 77 的答复', logs.output[0])
        self.assertIn('not delivered to lisi：消息 77 的答复', logs.output[1])
        self.assertFalse(server.client.trusted)

    def test_a_generator_that_fails_keeps_what_it_gave(self):
        def fails(msg):
            yield 'a'
            yield 'b'
            raise ValueError('坏了')
        server = self.server(fails)
        server.debug = True
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertIsNone(self.ask(server))
        self.assertEqual(self.sent(), ['a', 'b', 'ValueError: 坏了'])

    def test_what_may_have_arrived_is_not_replied_as_well(self):
        server = self.server(lambda msg: ['a', 'b'])
        self.wecom.script('message/send', 'lost')
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.assertIsNone(self.ask(server))
        self.assertIn('may have been delivered', logs.output[0])
        self.assertEqual(self.sent(), ['a', 'b'])

    def test_a_wrong_item_fails_alone_wherever_it_stands(self):
        wrong = (pathlib.Path('missing.jpg'), {'MsgType': 'image', 'Image': 'MEDIA'}, {'Articles': ['a']}, b'bytes',
                 '   ', 7, {'msgtype': 7}, {'msgtype': 'text', 'text': {'content': b'x'}}, {'MsgType': 'file'},
                 {'msgtype': 'text', 'text': {'content': ''}}, {'Content': None}, {'a': 1}, float('nan'), object())
        shapes = (lambda: [bad, 'a', 'b'], lambda: ('a', bad, 'b'), lambda: ['a', 'b', bad],
                  lambda: iter([bad, 'a', 'b']), lambda: iter(['a', bad, 'b']), lambda: iter(['a', 'b', bad]),
                  lambda: ['a', [bad, ('b',)]])
        alone = (lambda: [bad, 'a'], lambda: ['a', bad], lambda: iter([bad, 'a']), lambda: iter(['a', bad]))
        server = self.server(lambda msg: (shapes + alone)[int(msg['FromUserName'])]())
        server.client.trusted = True
        server.client.per_minute = self.wecom.per_member = 10000
        users = [str(n) for n in range(len(shapes + alone))]
        self.wecom.users.update(zip(users, users))
        for bad in wrong:
            with self.subTest(bad=repr(bad)[:40]), self.assertLogs('easywechat', 'WARNING') as logs:
                self.wecom.inbox.clear()
                replies = [opened(server.handle(*delivery(message(FromUserName=user)))[2]) for user in users]
                self.assertEqual([reply and reply['Content'] for reply in replies], [None] * 7 + ['a'] * 4)
                server.finish(time.monotonic() + 10)
                self.assertEqual({user: [text for _, text in seen] for user, seen in self.wecom.inbox.items()},
                                 dict.fromkeys(users[:len(shapes)], ['a', 'b']))
                form = 'ERROR:easywechat:callback .* failed：回调出错了，text 消息 [0-9]+，来自 ([0-9]+)\n +Traceback'
                failed = [re.findall(form, line) for line in logs.output]
                self.assertEqual(sorted(failed), sorted([user] for user in users))

    def test_what_fails_inside_a_list_takes_nobody_along(self):
        def fails():
            yield 'x'
            raise ValueError('坏了')
        endless = []
        endless.append(endless)             # 自己在自己里面
        for wrong, seen in ((fails, ['a', 'x', 'b']), (lambda: endless, ['a', 'b']),
                            (lambda: [[7], fails()], ['a', 'x', 'b'])):
            self.wecom.messages.clear()
            server = self.server(lambda msg, wrong=wrong: ['a', wrong(), (None, ['b'])])
            server.client.trusted = True
            with self.assertLogs('easywechat', 'ERROR'):
                self.assertIsNone(self.ask(server))
            self.assertEqual(self.sent(), seen)

    def test_no_user_sees_a_secret_however_much_is_shown(self):
        server = self.server(lambda msg: ['a', 'b'])
        self.ask(server)                    # 发过，有了 token
        token, settings = server.client.get_token(), self.wecom.settings
        planted = [token] + [settings[key] for key in ('secret', 'token', 'encoding_aes_key', 'robot')]

        def fails(msg):
            raise ValueError('x?access_token=%s ' % token + ' '.join(planted))
        server.register_callback('*', fails)
        server.debug = True
        with self.assertLogs('easywechat', 'ERROR') as logs:
            reply = self.ask(server)['Content']
        self.assertTrue(reply.startswith('ValueError: x?access_token=***'), reply)
        for secret in planted:
            self.assertNotIn(secret, reply)
            self.assertNotIn(secret, logs.output[0])

    def test_who_asked_another_app_is_answered_by_it(self):
        server = self.server(lambda msg: ['a', {'Content': 'b'}])
        self.wecom._check_agent = lambda agentid: None          # 一个什么应用都能用的 Secret
        self.ask(server, AgentID='1000003')
        self.assertEqual([m['agentid'] for m in self.wecom.messages], [1000003] * 2)
        del self.wecom._check_agent
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.ask(server, AgentID='1000003')
            self.ask(server, AgentID='1000003')
        self.assertEqual([m['agentid'] for m in self.wecom.messages[2:]], [1000002] * 4)
        self.assertEqual(len(logs.output), 1)
        self.assertRegex(logs.output[0], '1000003.*1000002')

    def test_a_json_event_has_no_passive_reply(self):
        seen = []
        event = {'ToUserName': SETTINGS['corpid'], 'FromUserName': 'lisi', 'CreateTime': NOW, 'MsgType': 'event',
                 'Event': 'smart_sheet_change', 'Fields': [{'Id': 'f1'}, {'Id': 'f2'}]}

        def callback(msg):
            seen.append(dict(msg))
            return '好了'
        able, unable = self.server(callback), self.server(callback, secret='')
        able.client.trusted = True
        self.assertEqual(able.handle(*delivery(json.dumps(event)))[::2], (200, b''))
        able.finish(time.monotonic() + 5)
        self.assertEqual((seen, self.sent()), ([event], ['好了']))
        event['CreateTime'] += 1
        method, target, body = delivery(' ' + json.dumps(event))
        body = json.dumps({'tousername': 'x', 'encrypt': xml_to_dict(body)['Encrypt']}).encode()
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for _ in range(2):
                self.assertEqual(ask_wsgi(unable, method, target, body)[::2], (200, b''))
        self.assertEqual((seen[1:], len(logs.output)), ([event], 1))
        deep = '{"a":' * 70 + '1' + '}' * 70
        for text in ('{', '{"a": }', '{"a": 1', '{"a": NaN}', deep, '{"a": ' + '[' * 100000, '{"a": %s}' % ('9' * 5000),
                     ' {"a": "\\ud800"', '[]', '7', 'null', '"x"'):
            self.assertEqual(unable.handle(*delivery(text))[::2], (403, b''), text[:20])
        self.assertEqual(len(seen), 2)

    def test_the_client_of_the_server_is_its_own(self):
        server = self.server(print)
        server.client.send('x', to='lisi')
        self.assertEqual(self.sent(), ['x'])
        with raises(ConfigError):
            make_server().client.get_token()


class LateTests(HastyCase):
    """慢的回调、坏的 API：给了的一条也不丢，谁也不等谁。"""

    def able(self, callback, **settings):
        """能主动发送的 →（server, 网址）。"""
        server, url = self.server(callback, **settings)
        server.client.get_token()
        server.client.trusted = True
        return server, url

    def test_while_the_api_is_silent_all_there_is_goes_out_as_one_reply(self):
        self.wecom.patience, began, took = 2, time.monotonic(), {}
        for path in 'gettoken', 'agent/get', 'message/send':
            self.wecom.script(path, *['hang'] * 50)
        server, url = self.server(lambda msg: ['first', 'second'])
        server.client.call_within = 3

        def deliver(user):
            self.wecom.deliver(url, user=user)
            took[user] = time.monotonic() - began
        users = self.users(8)
        for thread in self.at_once(deliver, users):
            thread.join(7)
        self.assertEqual([self.wecom.inbox[user] for user in users], [[('text', 'first\n\nsecond')]] * 8)
        self.assertTrue(0.4 < min(took.values()) and max(took.values()) < 1.2, took)

    def test_who_cannot_send_gets_what_is_there_at_the_end_of_the_last_delivery(self):
        go = threading.Event()
        self.addCleanup(go.set)

        def slow(msg):
            yield 'working'
            go.wait(10)
            yield 'done'
            yield 'never asked for'
        server, url = self.server(slow, secret='')
        threading.Timer(0.8, setattr, (self.wecom, 'patience', 2)).start()      # 第三次等得久，测试才不怕慢的机器
        with self.assertLogs('easywechat', 'WARNING') as logs:
            begin = time.monotonic()
            self.wecom.deliver(url, MsgId=4711)
            took = time.monotonic() - begin
            go.set()
            server.finish(time.monotonic() + 5)
        self.assertEqual(self.wecom.inbox['zhangsan'], [('text', 'working')])
        self.assertEqual(len(logs.output), 1)
        self.assertIn('not sent to zhangsan：消息 4711 的 1 条答复', logs.output[0])
        self.assertTrue(1.3 < took < 2, took)           # 第三次投递的 answer_within

    def test_a_callback_that_never_returns_holds_the_next_answer_up_for_a_while_only(self):
        go = threading.Event()
        self.addCleanup(go.set)
        with swapped(easywechat._Outbox, 'patience', 1.2):
            server, url = self.able(lambda msg: go.wait(20) and None if msg['Content'] == 'A' else ['b1', 'b2'])
            self.wecom.deliver(url, Content='A')
            self.wecom.deliver(url, Content='B')
            self.assertEqual(self.wecom.inbox['zhangsan'], [])
            self.wait_for(lambda: len(self.wecom.inbox['zhangsan']) == 2)
            self.assertEqual(self.wecom.inbox['zhangsan'], [('text', 'b1'), ('text', 'b2')])
            go.set()

    def test_a_push_under_way_when_stop_gives_up_is_in_the_log(self):
        server, url = self.able(lambda msg: {'msgtype': 'text', 'text': {'content': 'x'}, 'safe': 0})
        server.client.call_within, server.stop_within = 1.2, 0.1
        self.wecom.script('message/send', 'hang')
        self.wecom.deliver(url, MsgId=4711)
        with self.assertLogs('easywechat', 'WARNING') as logs:
            server.stop()
            self.assertEqual(len(logs.output), 1)
            self.assertIn('消息 4711（zhangsan）', logs.output[0])
            server.finish(time.monotonic() + 5)
            self.assertEqual(len(logs.output), 2)       # 后来说的：也许到了

    def test_however_many_sends_are_stuck_the_clock_goes_on(self):
        go = threading.Event()
        self.addCleanup(go.set)

        def slow(msg):
            yield 'one'
            go.wait(10)
            yield 'two'
        card = {'msgtype': 'text', 'text': {'content': 'x'}, 'safe': 0}
        server, url = self.able(lambda msg: card if msg['Content'] == 'stuck' else slow(msg))
        server.client.call_within = 2.5
        self.wecom.script('message/send', *['hang'] * 64)
        self.wecom.patience, self.wecom.deliveries, took = 3, 1, []
        users = self.users(75)

        def deliver(user):
            begin = time.monotonic()
            answer = self.wecom.ask(url, self.wecom.message(user, Content='slow'))
            took.append((answer, time.monotonic() - begin))
        with self.assertLogs('easywechat', 'ERROR') as logs:
            stuck = self.at_once(lambda user: self.wecom.deliver(url, user=user, Content='stuck'), users[:70])
            self.wait_for(lambda: self.count('message/send') == 64)
            for thread in self.at_once(deliver, users[70:]) + stuck:
                thread.join(5)
            self.assertEqual([answer for answer, _ in took], [(200, b'')] * 5)
            self.assertLess(max(seconds for _, seconds in took), 1)
            go.set()
            server.finish(time.monotonic() + 5)
        self.assertEqual(len(logs.output), 64)
        self.assertEqual([self.wecom.inbox[user] for user in users[70:]], [[('text', 'one'), ('text', 'two')]] * 5)
        self.assertEqual(sum(len(self.wecom.inbox[user]) for user in users[:70]), 6)

    def test_an_endless_generator_is_held_back(self):
        made, end = [], threading.Event()
        self.addCleanup(end.set)

        def endless(msg):
            for n in itertools.takewhile(lambda n: not end.is_set(), itertools.count()):
                made.append(n)
                yield str(n)
        server, url = self.able(endless)
        server.client.call_within, server.client.per_minute = 1.0, 10000
        self.wecom.per_member, self.wecom.deliveries, self.wecom.patience = 10000, 1, 2
        self.wecom.script('message/send', 'hang')
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.assertEqual(self.wecom.deliver(url), {})
            time.sleep(0.3)
            self.assertTrue(100 <= len(made) < 110, len(made))
            self.assertTrue(self.wait_for(lambda: len(self.wecom.messages) > 50))
            end.set()
            server.finish(time.monotonic() + 5)
        ours = [line for line in logs.output if 'to zhangsan' in line]      # 别的测试停下的，也许还在写日志
        self.assertEqual(len(ours), 1, logs.output)
        self.assertEqual([int(m['text']['content']) for m in self.wecom.messages], made[1:])    # 0 没有回音
        end.clear()
        del made[:]
        server, url = self.server(endless, secret='')
        with self.assertLogs('easywechat', 'WARNING') as logs:      # 不能发的：一条回复放不下的，不要了
            self.assertTrue(self.wecom.deliver(url)['Content'].startswith('0\n\n1\n\n2'))
        self.assertLess(len(made), 110)


class AsyncTests(HastyCase):
    """``async def`` 的回调：整个进程一个循环。"""

    def setUp(self):
        super().setUp()
        import asyncio              # easywechat 自己只在用到的时候导入
        self.asyncio = asyncio

    def say(self, url, user):
        self.wecom.deliver(url, user=user, Content='?')

    def task(self):
        return getattr(self.asyncio, 'current_task', None) or self.asyncio.Task.current_task    # 3.6 的

    def echo_server(self):
        """一行一行原样答的 TCP 服务 → 它的地址。"""
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    self.wfile.write(line)
        server = type('Server', (socketserver.ThreadingTCPServer,), {'daemon_threads': True})(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return server.server_address

    def test_a_thousand_messages_share_one_session(self):
        address, session, runs = self.echo_server(), {}, collections.Counter()

        async def callback(msg):
            runs[msg['Content']] += 1
            if not session:             # 在一次调用里造的，下一次接着用
                session['lock'] = self.asyncio.Lock()
            async with session['lock']:
                if 'streams' not in session:
                    session['streams'] = await self.asyncio.open_connection(*address)
                reader, writer = session['streams']
                if msg['Content'] == 'end':
                    return writer.close()
                writer.write(msg['Content'].encode() + b'\n')
                return (await reader.readline()).decode().strip()
        server = make_server(callback)
        where = server.start('127.0.0.1', 0)
        self.addCleanup(server.stop)
        wrong, rest = [], []

        def ask(numbers):
            for n in numbers:
                answer = opened(ask_socket(where, *delivery(message(Content='%d' % n)))[2])
                if answer['Content'] != '%d' % n:
                    wrong.append((n, answer))
        at_rest = threading.active_count()
        with swapped(easywechat._Seats, 'idle', 0.05):
            for half in range(2):
                for thread in self.at_once(ask, [range(half * 500 + i, half * 500 + 500, 8) for i in range(8)]):
                    thread.join()
                self.assertTrue(self.wait_for(lambda: threading.active_count() <= at_rest + 1))     # 看时间的那条
                rest.append(resident())
        self.assertEqual((wrong, len(runs), set(runs.values())), ([], 1000, {1}))
        ask_socket(where, *delivery(message(Content='end')))
        self.assertLess(rest[1] - rest[0], 2 << 20)

    def test_what_comes_out_is_taken_like_any_result(self):
        async def later(value):
            await self.asyncio.sleep(0)
            return value

        async def numbers(*numbers):
            task = self.task()()
            for n in numbers:
                self.assertIs(self.task()(), task)     # asyncio.timeout 只在自己的 task 里有用
                yield 'n%d' % n
                await self.asyncio.sleep(0)

        class Method:
            async def reply(self, msg):
                return msg['Content']
        server, url = self.server(print)
        rows = (
            ('a coroutine', lambda msg: later('a'), ['a']),
            ('a method', Method().reply, ['?']),
            ('an async generator', lambda msg: numbers(1, 2, 3), ['n1', 'n2', 'n3']),
            ('awaitables in a list', lambda msg: [later('a'), 'b', later(['c', later('d')])], ['a', 'b', 'c', 'd']),
            ('an async generator in a coroutine', lambda msg: later(numbers(1)), ['n1']),
            ('nothing', lambda msg: later(None), []))
        for n, (what, callback, expected) in enumerate(rows):
            with self.subTest(what):
                user = self.users(n + 1)[n]
                server.register_callback('text', callback)
                self.say(url, user)
                self.assertEqual(self.see(user, len(expected)), expected)

    def test_an_error_of_one_is_its_own(self):
        async def broken(msg):
            yield 'first'
            raise ValueError('boom')
        _, url = self.server(broken)
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.say(url, 'zhangsan')
            self.assertEqual(self.see('zhangsan', 1), ['first'])
        self.assertIn('ValueError: boom', logs.output[0])

    def test_who_is_not_listened_to_is_closed(self):
        given, closed = [], threading.Event()

        async def endless(msg):
            try:
                while True:
                    given.append(1)
                    yield 'x'
            finally:
                closed.set()
        server, url = self.server(endless, secret='')       # 只能有一条被动回复
        with self.assertLogs('easywechat', 'WARNING'):
            self.say(url, 'zhangsan')
            self.assertTrue(closed.wait(5))
        self.assertLess(len(given), 200)

    def test_what_never_ends_is_bounded_and_stop_cancels_it(self):
        begun, cancelled = [], []

        async def endless(msg):
            begun.append(msg)
            try:
                await self.asyncio.sleep(1000)
            except self.asyncio.CancelledError:
                cancelled.append(msg)
                raise

        async def drip(msg):
            begun.append(msg)
            try:
                while True:
                    yield 'drop'
                    await self.asyncio.sleep(1000)
            finally:
                cancelled.append(msg)
        for callback in endless, drip:
            with self.subTest(callback.__name__):
                del begun[:], cancelled[:]
                cls = type('Server', (Hastier,), {'max_callbacks': 8, 'stop_within': 0.3})
                server, url = self.server(callback, cls=cls, secret='')
                users = self.users(12)
                with self.assertLogs('easywechat', 'WARNING') as logs:
                    for thread in self.at_once(functools.partial(self.say, url), users):
                        thread.join()
                    self.assertEqual(len(begun), 8)
                    begin = time.monotonic()
                    server.stop()
                self.assertLess(time.monotonic() - begin, 1)
                self.assertTrue(self.wait_for(lambda: len(cancelled) == 8), len(cancelled))
                self.assertIn('CancelledError', ''.join(logs.output))

    def test_registration_says_what_is_missing(self):
        code = ("import sys; sys.modules['asyncio'] = None; import easywechat\n"
                "server = easywechat.WeChatServer('x', **easywechat._DEMO)\n"
                "async def callback(msg): pass\n"
                "try: server.register_callback('text', callback)\n"
                "except ImportError as e: print(e)\n")
        out = subprocess.check_output([sys.executable, '-c', code], cwd=HERE, env=dict(
            os.environ, EASYWECHAT_CONFIG='none', PYTHONIOENCODING='utf-8'))
        self.assertIn(b'opkg install python3-asyncio', out)


# ---- 回调模式 Dispatcher ----------------------------------------------------------------------

def ask_socket(address, method, target, body=b'', headers=None, raw=None):
    """真的套接字：→（状态，头部 dict, 正文）；没有一个字节就关了是 (0, {}, b'')。"""
    with socket.create_connection(address, 10) as sock:
        if raw is None:
            lines = ['%s %s HTTP/1.1' % (method, target), 'Host: nas']
            if method == 'POST' and 'Content-Length' not in (headers or {}):
                lines.append('Content-Length: %d' % len(body))
            lines += ['%s: %s' % item for item in (headers or {}).items() if item[1] is not None]
            raw = '\r\n'.join(lines).encode('latin-1') + b'\r\n\r\n' + body
        data = b''
        try:
            sock.sendall(raw)
            for piece in iter(lambda: sock.recv(65536), b''):
                data += piece
        except OSError:
            pass
    head, _, answer = data.partition(b'\r\n\r\n')
    lines = head.decode('latin-1').split('\r\n')
    if not data:
        return 0, {}, b''
    return (int(lines[0].split()[1]),
            dict(line.lower().split(': ', 1) for line in lines[1:]), answer)


def ask_wsgi(server, method, target, body=b'', headers=None):
    path, _, query = target.partition('?')
    environ = {'REQUEST_METHOD': method, 'SCRIPT_NAME': '', 'PATH_INFO': urllib.parse.unquote(path),
               'QUERY_STRING': query, 'SERVER_NAME': 'nas', 'SERVER_PORT': '80',
               'SERVER_PROTOCOL': 'HTTP/1.1', 'REMOTE_ADDR': '192.0.2.1', 'wsgi.version': (1, 0),
               'wsgi.input': io.BytesIO(body), 'wsgi.errors': io.StringIO(),
               'wsgi.multithread': True, 'wsgi.multiprocess': False, 'wsgi.run_once': False,
               'wsgi.url_scheme': 'http'}
    if method == 'POST':
        environ['CONTENT_LENGTH'] = str(len(body))
    for name, value in (headers or {}).items():
        key = name.upper().replace('-', '_')
        key = key if key == 'CONTENT_LENGTH' else 'HTTP_' + key
        environ[key] = value
        if value is None:
            del environ[key]
    got = []
    if re.fullmatch('[0-9]*', environ.get('CONTENT_LENGTH', '')):   # 不然 validate 自己先拒绝了
        app = wsgiref.validate.validator(server)
    else:
        app = server
    result = app(environ, lambda *args: got.append(args[:2]))
    answer = b''.join(result)
    getattr(result, 'close', int)()
    return int(got[0][0][:3]), {k.lower(): v.lower() for k, v in got[0][1]}, answer


def event(name, **fields):
    return dict({'Event': name, 'MsgType': 'event', 'MsgId': None}, **fields)


def contact(change, **fields):
    return event('change_contact', FromUserName='sys', ChangeType=change, **fields)


def approval(name, **fields):
    return event(name, FromUserName='sys', ApprovalInfo=dict({'SpNo': '1', 'ThirdNo': '1'}, **fields))


def chat(**fields):
    return event('change_external_chat', ChatId='c', ChangeType='update', **fields)


def click(name, **fields):
    return event(name, **dict({'EventKey': 'k', 'TaskId': 't', 'ResponseCode': 'RC'}, **fields))


def picture(name, *sums):
    return click(name, SendPicsInfo={'Count': len(sums), 'PicList': {'item': [{'PicMd5Sum': i} for i in sums]}})


def chosen(*options):
    return click('template_card_event', SelectedItems={'SelectedItem': {
        'QuestionKey': 'q', 'OptionIds': {'OptionId': list(options)}}})


#: 同一秒里的两个事件，只差一个字段（文档 90240、90970–90972、91815、92130、94670、95796…）。
TWINS = (
    (event('subscribe', EventKey=''), event('unsubscribe', EventKey='')),
    (event('enter_agent', EventKey=''), event('enter_agent', EventKey='', FromUserName='b')),
    (event('LOCATION', Latitude='23.1'), event('LOCATION', Latitude='23.2')),
    (event('batch_job_result', BatchJob={'JobId': '1'}), event('batch_job_result', BatchJob={'JobId': '2'})),
    (event('batch_job_result', BatchJob={'JobId': '1', 'JobType': 'sync_user'}),
     event('batch_job_result', BatchJob={'JobId': '1', 'JobType': 'replace_user'})),
    (event('batch_job_result', JobId='1', ErrCode=0), event('batch_job_result', JobId='1', ErrCode=1)),
    (contact('create_user', UserID='a'), contact('create_user', UserID='b')),
    (contact('update_user', UserID='a', Department='1'), contact('update_user', UserID='a', Department='1,2')),
    (contact('update_user', UserID='a', NewUserID='b'), contact('delete_user', UserID='a')),
    (contact('create_party', Id='3'), contact('create_party', Id='4')),
    (contact('update_party', Id='3', ParentId='1'), contact('update_party', Id='3', ParentId='2')),
    (contact('update_party', Id='3', Name='甲'), contact('update_party', Id='3', Name='乙')),
    (contact('update_tag', TagId='1', AddUserItems='a'), contact('update_tag', TagId='1', AddUserItems='b')),
    (contact('update_tag', TagId='1', AddUserItems='a'), contact('update_tag', TagId='1', DelUserItems='a')),
    (contact('update_tag', TagId='2', DelPartyItems='1'), contact('update_tag', TagId='2', DelPartyItems='2')),
    (click('click'), click('click', EventKey='l')),
    (click('view', EventKey='https://e.x/1'), click('view', EventKey='https://e.x/2')),
    (click('scancode_push', ScanCodeInfo={'ScanType': 'qrcode', 'ScanResult': '1'}),
     click('scancode_push', ScanCodeInfo={'ScanType': 'qrcode', 'ScanResult': '2'})),
    (picture('pic_sysphoto', 'a'), picture('pic_sysphoto', 'b')),
    (picture('pic_weixin', 'a', 'b'), picture('pic_weixin', 'b', 'a')),
    (click('location_select', SendLocationInfo={'Label': '甲'}),
     click('location_select', SendLocationInfo={'Label': '乙'})),
    (chosen('a'), chosen('b')),
    (chosen('a', 'b'), chosen('a')),
    (click('template_card_menu_event'), click('template_card_menu_event', TaskId='u')),
    (approval('open_approval_change', OpenSpStatus='1'), approval('open_approval_change', OpenSpStatus='2')),
    (approval('open_approval_change', approverstep='0'), approval('open_approval_change', approverstep='1')),
    (approval('sys_approval_change', StatuChangeEvent='2'), approval('sys_approval_change', StatuChangeEvent='10')),
    (approval('sys_approval_change', SpRecord=[{'SpStatus': '1'}, {'SpStatus': '1'}]),
     approval('sys_approval_change', SpRecord=[{'SpStatus': '2'}, {'SpStatus': '1'}])),
    (approval('sys_approval_change', Comments={'CommentContent': '好'}),
     approval('sys_approval_change', Comments={'CommentContent': '不好'})),
    (event('inactive_alert', EffectTime='1700000000'), event('inactive_alert', EffectTime='1700000001')),
    (event('upload_media_job_finish', JobId='1'), event('upload_media_job_finish', JobId='2')),
    (event('kf_msg_or_event', Token='1', FromUserName=None), event('kf_msg_or_event', Token='2', FromUserName=None)),
    (event('kf_account_auth_change', AuthAddOpenKfId=['a', 'b']),
     event('kf_account_auth_change', AuthAddOpenKfId=['a', 'c'])),
    (chat(UpdateDetail='change_notice'), chat(UpdateDetail='add_member')),
    (chat(UpdateDetail='add_member', MemChangeCnt='1'), chat(UpdateDetail='add_member', MemChangeCnt='2')),
    (event('change_external_contact', UserID='a', ExternalUserID='e', ChangeType='edit_external_contact'),
     event('change_external_contact', UserID='a', ExternalUserID='e', ChangeType='del_external_contact')),
    (event('change_chain', ChainId='1', CorpIds={'CorpId': ['a', 'b']}),
     event('change_chain', ChainId='1', CorpIds={'CorpId': ['a', 'c']})),
    (event('living_status_change', LivingId='1', Status=0), event('living_status_change', LivingId='1', Status=1)),
    (event('meeting_change', ChangeType='quit_waiting_room', MeetingId='m', OperatedUser={'UserId': 'a'}),
     event('meeting_change', ChangeType='quit_waiting_room', MeetingId='m', OperatedUser={'UserId': 'b'})),
    ({'MsgType': None, 'MsgId': None, 'FromUserName': None, 'SuiteId': 's', 'InfoType': 'suite_ticket'},
     {'MsgType': None, 'MsgId': None, 'FromUserName': None, 'SuiteId': 's', 'InfoType': 'create_auth'}))


class DispatcherTests(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.server = make_server(lambda msg: msg)
        cls.address = cls.server.start('127.0.0.1', 0)

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def doors(self, method, target, body=b'', headers=None):
        """同一个请求走三扇门，三个回答必须一样 →（状态，正文）。"""
        answers = [ask_socket(self.address, method, target, body, headers),
                   ask_wsgi(self.server, method, target, body, headers)]
        if not headers:
            status, sent, answer = self.server.handle(method, target, body)
            answers.append((status, {k.lower(): v.lower() for k, v in sent}, answer))
        for _, sent, answer in answers:
            sent.pop('connection', None)
            self.assertEqual(sent['content-length'], str(len(answer)))
            self.assertEqual(sent['x-content-type-options'], 'nosniff')
        self.assertEqual(len(set((a[0], a[1]['content-type']) for a in answers)), 1, answers)
        return answers[0][0], [a[2] for a in answers]

    def test_the_same_answer_through_three_doors(self):
        encrypt = CRYPT.seal('1616140317555161061')
        q = signed(encrypt)
        good = urllib.parse.urlencode(dict(q, echostr=encrypt.decode()))
        wrong = urllib.parse.urlencode(dict(q, msg_signature='0' * 40, echostr=encrypt.decode()))
        post, target, body = delivery(message(Content='x'))
        stale = delivery(message(Content='x'), timestamp=int(time.time()) - 400)
        table = [
            ('GET', '/weixin', b'', None, 200), ('GET', '/any/prefix/weixin/', b'', None, 200),
            ('HEAD', '/weixin', b'', None, 200), ('GET', '/', b'', None, 404),
            ('GET', '/xweixin', b'', None, 404), ('GET', '/weixin/..', b'', None, 404),
            ('DELETE', '/weixin', b'', None, 405), ('GET', '/weixin?' + good, b'', None, 200),
            ('HEAD', '/weixin?' + good, b'', None, 200), ('GET', '/weixin?' + wrong, b'', None, 403),
            ('GET', '/weixin?a=1', b'', None, 403), ('GET', '/weixin?nonce=%FF', b'', None, 403),
            ('GET', '/weixin?%s&nonce=1372623149' % good, b'', None, 403),
            ('GET', '/weixin?' + '&a=1' * 20, b'', None, 403),
            ('POST', '/weixin', b'', None, 400), ('POST', '/weixin', body, None, 403),
            ('POST', target, b'<xml></xml>', None, 400), ('POST', target, body[:-80], None, 400),
            ('POST', target.replace('nonce=1', 'nonce=2'), body, None, 403),
            stale[:1] + stale[1:2] + stale[2:] + (None, 403),
            ('POST', target, b'x' * ((1 << 20) + 1), None, 413),
            ('POST', target, body, {'Content-Length': None}, 411),
            ('POST', target, body, {'Content-Length': '-1'}, 400),
            ('POST', target, body, {'Content-Length': '1_0'}, 400),
            ('POST', target, body, {'Content-Length': '+10'}, 400),
            ('POST', target, body, {'Content-Length': '9999999999'}, 400),
            ('POST', target, body, {'Content-Length': '99999999'}, 413),
            ('POST', target, body, {'Content-Encoding': 'gzip'}, 400),
            ('POST', target, body, {'Content-Length': None, 'Transfer-Encoding': 'chunked'}, 411),
            ('POST', target, body, {'Transfer-Encoding': 'chunked'}, 400)]
        with self.assertLogs('easywechat', 'WARNING'):
            for method, where, data, headers, status in table:
                got, bodies = self.doors(method, where, data, headers)
                self.assertEqual(got, status, (method, where[:60], headers))
                if status != 200:
                    self.assertEqual(set(bodies), {b''})
        self.assertEqual(self.doors('GET', '/weixin?' + good)[1], [b'1616140317555161061'] * 3)

    def test_a_message_is_answered_alike_through_three_doors(self):
        status, bodies = self.doors(*delivery(message(Content='你好')))
        self.assertEqual(status, 200)
        for body in bodies:
            reply = opened(body)
            self.assertEqual((reply['Content'], reply['ToUserName'], reply['FromUserName']),
                             ('你好', 'li.lei', SETTINGS['corpid']))
        self.assertEqual(opened(bodies[0]), opened(bodies[2]))

    def test_a_body_that_is_cut_is_refused_by_wsgi(self):
        method, target, body = delivery(message(Content='x'))
        with self.assertLogs('easywechat', 'WARNING') as logs:
            headers = {'Content-Length': str(len(body) + 5)}
            self.assertEqual(ask_wsgi(self.server, method, target, body, headers)[0], 400)
        self.assertIn('shorter than its Content-Length', logs.output[0])

    def test_a_json_envelope_is_accepted(self):
        encrypt = CRYPT.seal(message(Content='json'))
        target = '/weixin?' + urllib.parse.urlencode(signed(encrypt))
        body = json.dumps({'tousername': 'ww', 'encrypt': encrypt.decode()}).encode()
        self.assertEqual(opened(self.doors('POST', target, body)[1][0])['Content'], 'json')

    def test_echo_of_what_the_user_may_type(self):
        for text in ('007', ' x ', ']]>', '<b>', '&amp;', '😀', '<!DOCTYPE html>', '\u2028'):
            body = self.server.handle(*delivery(message(Content=text)))[2]
            self.assertEqual(opened(body)['Content'], text)

    def test_media_are_echoed(self):
        for kind, wrapper in (('image', 'Image'), ('voice', 'Voice'), ('video', 'Video')):
            reply = opened(self.server.handle(*delivery(message(MsgType=kind, **CASES[kind])))[2])
            self.assertEqual((reply['MsgType'], reply[wrapper]), (kind, {'MediaId': 'M'}))

    def test_the_most_specific_callback_wins(self):
        server, seen = make_server(), []

        def named(name):
            return lambda msg, *groups: seen.append((name,) + groups)
        for kind in '*', 'text', 'event', 'event:click':
            server.register_callback(kind, named(kind))
        server.register_callback('text', named('first'), pattern=r'温度 (\w+)( \d+)?')
        server.register_callback('text', pattern=re.compile('温度.*'))(named('second'))
        for fields in ({'Content': '温度 厨房'}, {'Content': '温度?'}, {'Content': '别的'},
                       {'MsgType': 'event', 'Event': 'click', 'MsgId': None},
                       {'MsgType': 'event', 'Event': 'view', 'MsgId': None}, {'MsgType': 'link'}):
            self.assertEqual(server.handle(*delivery(message(**fields)))[0], 200)
        self.assertEqual(seen, [('first', '厨房', None), ('second',), ('text',), ('event:click',),
                                ('event',), ('*',)])

    def test_registration_refuses_what_cannot_be(self):
        server = make_server()
        self.assertRaises(TypeError, server.register_callback, 'text', object())
        for kind in ('', 'te xt', 'event:', 7, None, 'text:x', '中', print):
            self.assertRaises(ValueError, server.register_callback, kind, print)
            self.assertRaises(ValueError, server.register_callback, kind)
        self.assertRaises(ValueError, server.register_callback, 'image', print, 'x')
        self.assertRaises(TypeError, server.register_callback, 'text', None)    # 忘了 return 的函数的结果
        for pattern in b'x', re.compile(b'x'), 7:
            self.assertRaises(TypeError, server.register_callback, 'text', print, pattern)
        self.assertRaises(re.error, server.register_callback, 'text', print, '(')
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertIs(server.register_callback('text')(len), len)
            server.register_callback('text', print)
            server.register_callback('text', print)
        self.assertEqual([record.getMessage() for record in logs.records], [
            'text had a callback already：原来是 len，现在是 print'])
        for kind, close in ('txt', 'text'), ('event:CLICK_', 'type'), ('event:location', 'location_'):
            with self.assertLogs('easywechat', 'WARNING') as logs:
                server.register_callback(kind, print)
            self.assertIn(close, logs.output[0])

    def test_bound_methods_work_and_keep_state(self):
        class Counter:
            n = 0

            def reply(self, msg):
                self.n += 1
                msg.clear()                     # 回调可以随便改它的 dict
                return str(self.n)
        server = make_server(Counter().reply)
        for n in '12':
            reply = opened(server.handle(*delivery(message(Content='x')))[2])
            self.assertEqual((reply['Content'], reply['ToUserName']), (n, 'li.lei'))

    def test_a_callback_that_fails_is_logged_and_answered_empty(self):
        def bad(msg):
            raise ValueError('坏了\x1b[31m\nforged line ' + msg['Content'])

        def leave(msg):
            sys.exit('x')
        for callback in bad, leave, lambda msg: 7, lambda msg: {'MsgType': 'image', 'Image': 1.5}:
            server = make_server(callback)
            with self.assertLogs('easywechat', 'ERROR') as logs:
                self.assertEqual(server.handle(*delivery(message(Content='x')))[::2], (200, b''))
            self.assertIn(callback.__qualname__, logs.output[0])
            self.assertNotIn('\x1b', logs.output[0])
            self.assertNotIn('\nforged', logs.output[0])
        server = make_server(bad)
        server.debug = True
        with self.assertLogs('easywechat', 'ERROR'):
            reply = opened(server.handle(*delivery(message(Content='x')))[2])
        self.assertTrue(reply['Content'].startswith('ValueError: 坏了'))

    def test_nobody_registered_is_an_empty_200(self):
        self.assertEqual(make_server().handle(*delivery(message()))[::2], (200, b''))

    def test_events_are_told_apart_by_their_key(self):
        seen = []
        server = make_server(seen.append)
        event = dict(MsgType='event', MsgId=None, FromUserName='sys', Event='change_contact')
        events = [dict(event, ChangeType='create_user', UserID='a'),
                  dict(event, ChangeType='create_user', UserID='b'),
                  dict(event, ChangeType='delete_user', UserID='a'),
                  dict(event, Event='batch_job_result', BatchJob={'JobId': '1'}),
                  dict(event, Event='batch_job_result', BatchJob={'JobId': '2'}),
                  dict(event, Event='change_chain', ChainId='1', GroupIds={'GroupId': ['1', '2']}),
                  dict(event, Event='change_chain', ChainId='1', GroupIds={'GroupId': ['1', '3']}),
                  dict(event, CreateTime=NOW + 1)]
        for fields in events * 3:
            self.assertEqual(server.handle(*delivery(message(**fields)))[0], 200)
        self.assertEqual(len(seen), len(events))

    def test_two_events_of_one_second_are_two_however_little_differs(self):
        seen = []
        server = make_server(seen.append)
        for twins in TWINS:
            texts = [message(CreateTime=NOW - 100 + len(seen), **fields) for fields in twins]
            with self.subTest(twins=twins):
                before = len(seen)
                for xml in texts * 3:
                    self.assertEqual(server.handle(*delivery(xml))[::2], (200, b''))
                self.assertEqual(len(seen) - before, 2)
        self.assertEqual(len(TWINS), 40)

    def test_a_message_is_one_of_its_sender_and_its_app(self):
        runs, store = [], MemoryStore()

        def callback(msg):
            runs.append(msg)
            return '给 %s 的 %d' % (msg['FromUserName'], len(runs))
        server = make_server(callback, store=store)
        answers = [opened(server.handle(*delivery(message(MsgId='7', FromUserName=user)))[2])
                   for user in ('lisi', 'wangwu', 'lisi')]
        self.assertEqual([(a['ToUserName'], a['Content']) for a in answers], [
            ('lisi', '给 lisi 的 1'), ('wangwu', '给 wangwu 的 2'), ('lisi', '给 lisi 的 1')])
        others = [dict(SETTINGS), dict(SETTINGS, agentid='1000003'), dict(SETTINGS, token='AnotherToken')]
        for fields in {'MsgId': '8'}, {'MsgId': None, 'MsgType': 'event', 'Event': 'click'}:
            del runs[:]
            xml = message(**fields)
            for settings in others * 2:
                crypt = WXBizMsgCrypt(settings['token'], settings['encoding_aes_key'], settings['corpid'])
                with swapped(sys.modules[__name__], 'CRYPT', crypt):
                    request = delivery(xml)
                server = WeChatServer('test', store=store, **settings)
                server.register_callback('*', callback)
                self.assertEqual(server.handle(*request)[0], 200)
            self.assertEqual(len(runs), 3, fields)

    def test_what_wecom_documents_is_not_too_large(self):
        # 审批抄送给 1,100 个人；文档的上限是多少没有写。
        seen = []
        server = make_server(lambda msg: seen.append(msg) or 'ok')
        people = [{'UserId': 'someone.with.a.long.name.%04d' % n} for n in range(1100)]
        xml = message(MsgType='event', MsgId=None, Event='sys_approval_change', ApprovalInfo={'Notifyer': people})
        self.assertGreater(len(xml), 58000)
        self.assertEqual(server.handle(*delivery(xml))[0], 200)
        self.assertEqual(seen[0]['ApprovalInfo']['Notifyer'], people)
        for count, status in (19998, 200), (20000, 403):
            text = '<xml><MsgType>text</MsgType>%s</xml>' % ('<A/>' * count)
            self.assertEqual(server.handle(*delivery(text))[0], status)

    def test_recut_and_replayed_requests_run_nothing_twice(self):
        seen = []
        server = make_server(lambda msg: seen.append(msg['MsgId']))
        verified = 0
        for n in range(200):
            nonce = str(random.randint(10 ** 8, 10 ** 9))
            encrypt = CRYPT.seal(message(Content='x' * n))
            q = signed(encrypt, nonce)
            body = b'<xml><Encrypt>' + encrypt + b'</Encrypt></xml>'
            again = [dict(q), dict(q),
                     dict(q, timestamp=q['timestamp'][:9], nonce=q['timestamp'][9:] + nonce),
                     dict(q, timestamp=q['timestamp'] + nonce[:1], nonce=nonce[1:])]
            for query in [q] + again:
                status = server.handle('POST', '/weixin?' + urllib.parse.urlencode(query), body)[0]
                verified += status == 200
            cut = b'<xml><Encrypt>' + encrypt[64:] + b'</Encrypt></xml>'
            query = dict(q, nonce=nonce + encrypt[:64].decode())
            self.assertEqual(server.handle('POST', '/weixin?' + urllib.parse.urlencode(query), cut)[0],
                             403)
        self.assertEqual(len(seen), 200)
        self.assertEqual(len(set(seen)), 200)
        self.assertEqual(verified, 600)

    def test_a_slow_callback_is_joined_by_the_next_delivery(self):
        class Impatient(WeChatServer):
            answer_within = hold_within = 0.05
        go, runs = threading.Event(), []

        def slow(msg):
            runs.append(msg)
            go.wait(10)
            return '好了'
        server = make_server(slow, Impatient)
        address = server.start('127.0.0.1', 0)
        xml = message(Content='x')
        self.assertEqual(ask_socket(address, *delivery(xml))[0], 0)     # 断开：企业微信会再来
        self.assertEqual(ask_wsgi(server, *delivery(xml))[0], 503)
        go.set()
        server.hold_within = 10
        self.assertEqual(opened(ask_socket(address, *delivery(xml))[2])['Content'], '好了')
        self.assertEqual(len(runs), 1)
        server.stop()

    def test_an_answer_that_nobody_waits_for_is_in_the_log(self):
        class Impatient(WeChatServer):
            answer_within = hold_within = 0.01
        server = make_server(lambda msg: time.sleep(0.2) or '晚了', Impatient)
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertEqual(server.handle(*delivery(message()))[0], 503)
            server.stop()
            server.finish(time.monotonic() + 5)
        self.assertIn('no delivery waited', logs.output[0])

    def test_when_all_callbacks_are_busy_nothing_is_lost(self):
        class Small(WeChatServer):
            max_callbacks, answer_within, hold_within = 1, 0.05, 0.05
        go = threading.Event()
        server = make_server(lambda msg: go.wait(10) and 'ok', Small)
        first, second = message(Content='1'), message(Content='2')
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertEqual(server.handle(*delivery(first))[0], 503)
            self.assertEqual(server.handle(*delivery(second))[0], 503)
        go.set()
        server.hold_within = 10
        for xml in first, second:
            self.assertEqual(opened(server.handle(*delivery(xml))[2])['Content'], 'ok')

    def test_one_sender_holds_a_quarter_of_the_callbacks(self):
        go, seen = threading.Event(), []
        self.addCleanup(go.set)

        def callback(msg):
            seen.append(msg['FromUserName'])
            if msg['Content'] == 'slow':
                go.wait(10)
            return msg
        server = make_server(callback)
        address = server.start('127.0.0.1', 0)
        self.addCleanup(server.stop)

        def ask(user, content):
            return opened(ask_socket(address, *delivery(message(FromUserName=user, Content=content)))[2])
        slow = [delivery(message(FromUserName='slow', Content='slow')) for _ in range(40)]
        with contextlib.ExitStack() as stack:
            for method, target, body in slow:
                sock = stack.enter_context(socket.create_connection(address, 10))
                head = '%s %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n' % (method, target, len(body))
                sock.sendall(head.encode() + body)
            begin = time.monotonic()
            while len(seen) < 8 and time.monotonic() < begin + 5:
                time.sleep(0.01)
            for n in range(20):
                self.assertEqual(ask('other%d' % n, 'x')['Content'], 'x')
            self.assertLess(time.monotonic() - begin, 2)
            self.assertEqual(seen.count('slow'), 8)
            go.set()
            begin = time.monotonic()
            while seen.count('slow') < 40 and time.monotonic() < begin + 5:
                time.sleep(0.01)
            self.assertEqual(seen.count('slow'), 40)        # 轮到了，还等着的也跑
        for most, quarter in (1, 1), (3, 1), (4, 1), (8, 2):
            server.max_callbacks = most
            server._once._busy['a'] = quarter
            self.assertFalse(server._once._turn('a'))
            self.assertEqual(server._once._turn('b'), most > 1)
            server._once._busy.clear()

    def test_an_unset_clock_is_believed_once_with_a_warning(self):
        server = make_server(lambda msg: 'x')
        server._now = lambda: 0
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for _ in range(3):
                self.assertEqual(server.handle(*delivery(message()))[0], 200)
        self.assertEqual(len(logs.output), 1)

    def test_refusals_say_why_ten_times_a_minute(self):
        server = make_server()
        other = WeChatServer('o', **dict(SETTINGS, corpid='wwother0123456789'))
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for _ in range(50):
                server.handle('GET', '/nosuch\x1b', client='203.0.113.9')
            other.handle(*delivery(message()))
            now = time.monotonic()
            server._refusals._clock = lambda: now + 61
            server.handle('GET', '/nosuch', client='198.51.100.7')
        text = '\n'.join(logs.output)
        self.assertEqual(text.count('203.0.113.9 with'), 10)
        self.assertIn('refused 40 more：一分钟里又拒绝了这么多次，来自 1 个地址：203.0.113.9 (50)', text)
        self.assertIn('got wwte...ab, corpid here is wwot...89', text)
        self.assertNotIn('\x1b', text)

    def test_a_thousand_addresses_do_not_overwrite_the_log(self):
        server = make_server()
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for n in range(1500):
                for _ in range(1 + n % 2):
                    server.handle('GET', '/nosuch', client='2001:db8::%x' % n)
            self.assertEqual(len(logs.output), 100)
            now = time.monotonic()
            server._refusals._clock = lambda: now + 61
            server.handle('GET', '/nosuch', client='198.51.100.7')
        self.assertEqual(len(logs.output), 102)
        self.assertIn('refused 2150 more：', logs.output[100])
        self.assertIn('，来自 1001 个地址：other addresses (750), ', logs.output[100])
        self.assertLess(len(logs.output[100]), 300)


class WireTests(unittest.TestCase):
    """看得见来往的每个字节、没有密钥的人，能做什么：录下来，改一改边界，再发。"""

    def setUp(self):
        self.seen = []

        def callback(msg):
            self.seen.append(msg)
            return msg
        self.server = make_server(callback)
        self.address = self.server.start('127.0.0.1', 0)
        self.addCleanup(self.server.stop)

    def ask(self, method, target, body=b''):
        return ask_socket(self.address, method, target, body)

    def post(self, plaintext, **kwargs):
        return self.ask(*delivery(plaintext, **kwargs))

    def verify(self, text, method='GET'):
        encrypt = CRYPT.seal(text)
        query = dict(signed(encrypt), echostr=encrypt.decode())
        return self.ask(method, '/weixin?' + urllib.parse.urlencode(query))

    def test_a_recorded_message_is_not_decrypted_for_who_asks(self):
        method, target, body = delivery(message(Content='secret'))
        status, _, answer = self.ask(method, target, body)
        self.assertEqual(status, 200)
        for envelope in body, answer:
            found = xml_to_dict(envelope)
            query = {'msg_signature': found.get('MsgSignature'), 'timestamp': found.get('TimeStamp'),
                     'nonce': found.get('Nonce')}
            if not query['nonce']:
                query = dict(urllib.parse.parse_qsl(target.partition('?')[2]))
            query = urllib.parse.urlencode(dict(query, echostr=found['Encrypt']))
            for method in 'GET', 'HEAD':
                self.assertEqual(self.ask(method, '/weixin?' + query)[::2], (403, b''))
            parts = [value for _, value in urllib.parse.parse_qsl(query)]
            self.assertEqual(CRYPT.VerifyURL(*parts), (-40008, None))

    def test_what_a_verification_answers(self):
        for text, good in (('1616140317555161061', True), ('x', True), ('!' * 64, True), ('a' * 65, False), ('', False),
                           ('<xml>', False), ('{"a":1}', False), ('<', False), ('a b', False), ('a\n', False),
                           ('\u4e2d', False), ('a\x00', False), (message(), False), ('\ufeff<xml/>', False)):
            with self.subTest(text=text[:70]):
                self.assertEqual(self.verify(text)[::2], (200, text.encode()) if good else (403, b''))

    def test_a_timestamp_and_a_nonce_that_changed_places(self):
        later = int(time.time()) + 86400
        encrypt = CRYPT.seal(message())
        query = signed(encrypt, nonce=str(later))
        body = b'<xml><Encrypt>%s</Encrypt></xml>' % encrypt
        self.assertEqual(self.ask('POST', '/weixin?' + urllib.parse.urlencode(query), body)[0], 200)
        query['timestamp'], query['nonce'] = query['nonce'], query['timestamp']
        self.server._now, self.server.store._clock = lambda: later, lambda: time.monotonic() + 86400
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertEqual(self.ask('POST', '/weixin?' + urllib.parse.urlencode(query), body)[0], 403)
        self.assertEqual(len(self.seen), 1)
        self.assertIn('CreateTime %d, clock here %d' % (NOW, later), logs.output[0])

    def test_the_time_of_the_message_itself(self):
        for created, good in ((NOW - 500, True), (NOW - 700, False), (NOW + 200, True), (NOW + 400, False),
                              (None, True), ('x', True), ('', True), (0, True)):
            with self.subTest(created=created):
                self.assertEqual(self.post(message(CreateTime=created))[0], 200 if good else 403)
        text = {'msgtype': 'text', 'msgid': 'm', 'aibotid': 'b', 'from': {'userid': 'u'}, 'create_time': NOW - 700}
        self.assertEqual(self.post(json.dumps(text))[0], 403)
        self.server.max_skew = 400                      # 记 800 秒
        self.assertEqual([self.post(message(CreateTime=NOW - age))[0] for age in (700, 850)], [200, 403])
        self.server.max_skew = 0
        self.assertEqual(self.post(message(CreateTime=1), timestamp=1500000000)[0], 200)
        self.server.max_skew, self.server._now = 300, lambda: 0         # 没有校过的时钟
        self.assertEqual(self.post(message(CreateTime=1))[0], 200)

    def test_what_is_accepted_is_remembered_until_it_is_too_old(self):
        clock = [0.0]
        self.server._now = lambda: NOW + clock[0]
        self.server.store._clock = lambda: clock[0]
        xml = message(CreateTime=NOW + 300)                     # 最早能来的
        for clock[0] in range(0, 2000, 50):
            self.post(xml, timestamp=int(NOW + clock[0]))       # 时间和 nonce 里能读出什么，随他挑
        self.assertEqual(len(self.seen), 1)

    def test_our_own_answer_sent_back_runs_nothing(self):
        answer = self.post(message(Content='hi'))[2]
        found = xml_to_dict(answer)
        query = urllib.parse.urlencode({'msg_signature': found['MsgSignature'], 'timestamp': found['TimeStamp'],
                                        'nonce': found['Nonce']})
        for _ in range(6):
            with self.assertLogs('easywechat', 'WARNING') as logs:
                self.assertEqual(self.ask('POST', '/weixin?' + query, answer)[::2], (403, b''))
            self.assertIn('our own answer', logs.output[0])
        self.assertEqual([msg['Content'] for msg in self.seen], ['hi'])

    def test_who_a_message_is_from_and_to(self):
        own, poll = SETTINGS['corpid'], {'msgtype': 'stream', 'msgid': 'M', 'aibotid': 'B', 'from': {'userid': 'u'}}
        def without(name):
            return {k: v for k, v in poll.items() if k != name}
        for fields, good in (
                ({'FromUserName': own}, False), ({'FromUserName': own.upper()}, False),
                ({'ToUserName': 'li.lei'}, False), ({'ToUserName': 'li.lei', 'FromUserName': own}, False),
                ({'ToUserName': None}, True), ({'FromUserName': None}, True), ({'FromUserName': 'sys'}, True),
                (poll, True), (without('msgid'), False), (without('aibotid'), False), (without('from'), False)):
            text = json.dumps(fields) if 'msgtype' in fields else message(**fields)
            with self.subTest(text=text[:200]):
                self.assertEqual(self.post(text)[0], 200 if good else 403)

    def test_long_answers_push_out_no_claim(self):
        self.server.register_callback('*', lambda msg: self.seen.append(msg) or '长' * 680)
        first = delivery(message(FromUserName='victim'))
        self.assertEqual(self.ask(*first)[0], 200)
        for _ in range(2500):
            self.server.handle(*delivery(message(FromUserName='member')))
        self.assertEqual(self.ask(*first)[0], 200)
        self.assertEqual((len(self.seen), [m['FromUserName'] for m in self.seen].count('victim')), (2501, 1))


# ---- 服务器 Server ----------------------------------------------------------------------------

class ServerTests(unittest.TestCase):

    def start(self, callback=None, host='127.0.0.1', **attributes):
        server = make_server(callback or (lambda msg: msg), type('S', (WeChatServer,), attributes))
        address = server.start(host, 0)
        self.addCleanup(server.stop)
        return server, address

    def test_bytes_that_are_no_http_are_refused(self):
        server, address = self.start()
        for raw, status in ((b'\x16\x03\x01', 400), (b'SSH-2.0-x\r\n', 400), (b'get / HTTP/1.1\r\n', 400),
                            (b'GET / HTTP/1.1\nHost: x\n\n\r\n\r\n', 400),
                            (b'GET /%s HTTP/1.1\r\n' % (b'a' * 9000), 414),
                            (b'GET / HTTP/1.1\r\n' + b'A: b\r\n' * 65 + b'\r\n', 431),
                            (b'GET / HTTP/1.1\r\nA: %s\r\n\r\n' % (b'b' * 17000), 431),
                            (b'GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n', 400),
                            (b'GET / HTTP/1.1\r\nA : b\r\n\r\n', 400),
                            (b'GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n', 400),
                            (b'GET //weixin HTTP/1.1\r\n\r\n', 400)):
            self.assertEqual(ask_socket(address, '', '', raw=raw)[0], status, raw[:40])

    def test_expect_100_continue(self):
        server, address = self.start()
        method, target, body = delivery(message(Content='later'))
        with socket.create_connection(address, 10) as sock:
            sock.sendall(('POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n'
                          'Content-Length: %d\r\n\r\n' % (target, len(body))).encode())
            self.assertEqual(sock.recv(100), b'HTTP/1.1 100 Continue\r\n\r\n')
            sock.sendall(body)
            self.assertTrue(sock.recv(100).startswith(b'HTTP/1.1 200'))

    def test_a_head_has_its_own_deadline_and_its_own_count(self):
        server, address = self.start(head_within=0.2, request_within=30)
        with socket.create_connection(address, 10) as sock:
            sock.sendall(b'GET /weixin HTTP/1.1\r\nA: ')
            begin = time.monotonic()
            self.assertEqual(sock.recv(1), b'')
            self.assertLess(time.monotonic() - begin, 2)
        for count, status in (64, 200), (65, 431):
            raw = b'GET /weixin HTTP/1.1\r\n%s\r\n' % b''.join(b'A%d: x\r\n' % n for n in range(count))
            self.assertEqual(ask_socket(address, 'GET', '', raw=raw)[0], status)

    def test_a_refusal_lingers_shortly(self):
        server, address = self.start()
        with socket.create_connection(address, 10) as sock:
            sock.sendall(b'DELETE /weixin HTTP/1.1\r\n\r\n')
            while sock.recv(4096):
                pass
            begin = time.monotonic()
            with contextlib.suppress(OSError):      # 它关了，再发就有 RST
                while time.monotonic() < begin + 5:
                    sock.sendall(b'x')
                    time.sleep(0.05)
        self.assertLess(time.monotonic() - begin, 1.5)

    def test_who_does_not_read_its_answer_is_left(self):
        server, address = self.start(lambda msg: 'x' * 2000, write_within=0.2, stop_within=10)
        server.register_callback('text', lambda msg: {'Articles': [{'Title': 'x' * (4 << 20)}]})
        method, target, body = delivery(message(Content='x'))
        with socket.create_connection(address, 10) as sock:
            head = '%s %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n' % (method, target, len(body))
            sock.sendall(head.encode() + body)
            sock.recv(1)
            begin = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - begin, 2)

    def test_callbacks_leave_threads_to_readers(self):
        go, runs = threading.Event(), []
        self.addCleanup(go.set)
        server, address = self.start(lambda msg: runs.append(1) or go.wait(10) and 'x', max_connections=2,
                                     max_callbacks=4)
        with contextlib.ExitStack() as stack:
            for n in range(4):
                sock = stack.enter_context(socket.create_connection(address, 10))
                method, target, body = delivery(message(Content='x', FromUserName='user%d' % n))
                head = '%s %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n' % (method, target, len(body))
                sock.sendall(head.encode() + body)
            deadline = time.monotonic() + 5
            while len(runs) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            self.assertEqual((len(runs), ask_socket(address, 'GET', '/weixin')[0]), (4, 200))
            go.set()

    def test_deadlines_are_totals(self):
        server, address = self.start(head_within=0.3, request_within=0.3)
        for start in (b'GET /weixin HTTP/1.1\r\nA: ',
                      b'POST /weixin HTTP/1.1\r\nContent-Length: 999\r\n\r\n'):
            with socket.create_connection(address, 10) as sock:
                sock.sendall(start)
                begin = time.monotonic()
                sock.settimeout(0.02)
                while time.monotonic() - begin < 5:
                    try:
                        sock.sendall(b'a')
                        if not sock.recv(100):
                            break
                    except socket.timeout:
                        continue
                    except OSError:
                        break
                self.assertLess(time.monotonic() - begin, 2)

    def test_at_the_cap_the_oldest_reader_goes(self):
        server, address = self.start(max_connections=4)
        held = [socket.create_connection(address, 10) for _ in range(40)]
        self.assertEqual(opened(ask_socket(address, *delivery(message(Content='还在')))[2])['Content'],
                         '还在')
        held[0].settimeout(2)           # 头部的时限是 5 秒：关它的不是时限
        self.assertEqual(held[0].recv(1), b'')
        for sock in held:
            sock.close()

    def test_bodies_that_never_end_take_no_memory(self):
        server, address = self.start(max_reading=100000)
        head = b'POST /weixin HTTP/1.1\r\nContent-Length: 60000\r\n\r\n' + b'x' * 50000
        held = [socket.create_connection(address, 10) for _ in range(6)]
        for sock in held:
            sock.sendall(head)
            sock.settimeout(2)          # 读完整个请求的时限是 10 秒
        self.assertEqual(held[0].recv(1), b'')
        self.assertEqual(opened(ask_socket(address, *delivery(message(Content='还在')))[2])['Content'],
                         '还在')
        for sock in held:
            sock.close()

    def test_who_vanishes_leaves_nothing(self):
        server, address = self.start()
        method, target, body = delivery(message(Content='x'))
        raw = ('POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n' % (target, len(body))).encode() + body
        for cut in (0, 1, 20, len(raw) - 1, len(raw)):
            sock = socket.create_connection(address, 10)
            sock.sendall(raw[:cut])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            sock.close()
        self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)
        server.stop()
        self.assertEqual(len(server._once._runs), 0)

    def test_many_at_once(self):
        server, address = self.start()
        answers = []

        def deliver(n):
            for i in range(10):
                text = '%d-%d' % (n, i)
                answers.append(opened(ask_socket(address, *delivery(message(Content=text)))[2])
                               ['Content'] == text)
        threads = [threading.Thread(target=deliver, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(answers, [True] * 80)

    def test_ipv6_and_ipv4_on_one_socket(self):
        try:
            server, address = self.start(host='::')
        except OSError:
            self.skipTest('no IPv6 here')
        for host in '127.0.0.1', '::1':
            self.assertEqual(ask_socket((host, address[1]), 'GET', '/weixin')[0], 200)

    def test_stop_answers_what_is_in_flight_and_start_works_again(self):
        begun, go = threading.Event(), threading.Event()

        def slow(msg):
            begun.set()
            go.wait(10)
            return 'done'
        server, address = self.start(slow)
        got = []
        client = threading.Thread(
            target=lambda: got.append(ask_socket(address, *delivery(message(Content='x')))))
        client.start()
        begun.wait(10)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        go.set()
        stopper.join()
        client.join()
        self.assertEqual(opened(got[0][2])['Content'], 'done')
        self.assertRaises(OSError, socket.create_connection, address, 1)
        address = server.start('127.0.0.1', 0)
        self.assertRaises(RuntimeError, server.start)
        self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)

    def test_run_works_in_any_thread(self):
        server, numbers = make_server(lambda msg: msg), (signal.SIGTERM, signal.SIGINT)
        before = [signal.getsignal(number) for number in numbers]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            thread = threading.Thread(target=server.run, args=('127.0.0.1', 0, False),
                                      kwargs={'threaded': True})
            thread.start()
            while not server._http and thread.is_alive():
                time.sleep(0.001)
            while '监听' not in err.getvalue() and thread.is_alive():
                time.sleep(0.001)
            port = int(re.search(r'127\.0\.0\.1:(\d+)', err.getvalue()).group(1))
            self.assertEqual(ask_socket(('127.0.0.1', port), 'GET', '/weixin')[0], 200)
            self.assertEqual([signal.getsignal(number) for number in numbers], before)      # 信号只归主线程
            server.stop()
            thread.join(5)
        self.assertFalse(thread.is_alive())

    def test_an_answer_larger_than_the_buffers_arrives_whole(self):
        def respond(self, method, target, body, client, send):
            send(200, [('Content-Length', str(8 << 20))], b'x' * (8 << 20))
        server, address = self.start(respond=respond)
        status, _, body = ask_socket(address, 'GET', '/weixin')
        self.assertEqual((status, len(body)), (200, 8 << 20))

    def test_it_stops_where_shutdown_does_not_wake_accept(self):
        class Deaf(socket.socket):          # macOS、Windows
            def shutdown(self, how):
                raise OSError(errno.ENOTCONN, 'not connected')
        server = make_server()
        with swapped(sys, 'platform', 'darwin'), swapped(socket, 'socket', Deaf):
            address = server.start('127.0.0.1', 0)
        for _ in range(3):
            self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)
        begin = time.monotonic()
        server.stop()
        self.assertLess(time.monotonic() - begin, 2)
        self.assertRaises(OSError, socket.create_connection, address)

    def test_a_silent_connection_delays_no_stop(self):
        server, address = self.start()
        with socket.create_connection(address), socket.create_connection(address) as late:
            late.sendall(b'GET /weixin HTTP/1.1\r\n\r\n')
            begin = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - begin, 2)

    def test_accepting_never_ends_by_an_error(self):
        class Faulty:
            def __init__(self, sock):
                self.sock = sock
                self.faults = [MemoryError(), OSError(errno.EMFILE, 'x'), ConnectionAbortedError(), ValueError('x')]

            def accept(self):
                if self.faults:
                    raise self.faults.pop()
                return self.sock.accept()

            def __getattr__(self, name):
                return getattr(self.sock, name)
        server, address = self.start(head_within=20)
        with self.assertLogs('easywechat', 'ERROR') as logs, socket.create_connection(address, 10) as idle:
            self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)
            server._http.socket = Faulty(server._http.socket)
            while server._http.socket.faults:
                ask_socket(address, 'GET', '/weixin')       # 描述符用完的时候，正在读的会被关掉
            self.assertEqual(idle.recv(1), b'')
            self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)
        self.assertEqual((server._http.socket.faults, len(logs.output)), ([], 2))

    def test_limits_set_before_it_starts_are_obeyed(self):
        running, most = [], []

        def callback(msg):
            running.append(msg['Content'])
            most.append(len(running))
            time.sleep(0.6 if msg['Content'] == 'slow' else 0.1)
            running.remove(msg['Content'])
            return msg['Content']
        for door in 'socket', 'handle':
            server = make_server(callback)
            server.max_callbacks, server.answer_within, server.hold_within, server.lease = 1, 0.9, 1.2, 0.3
            address = server.start('127.0.0.1', 0)
            self.addCleanup(server.stop)
            answers = []

            def ask(text, server=server, address=address, answers=answers, door=door):
                request = delivery(message(Content=text))
                answer = ask_socket(address, *request) if door == 'socket' else server.handle(*request)
                answers.append(opened(answer[2])['Content'])
            threads = [threading.Thread(target=ask, args=(text,)) for text in 'abc']
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual((sorted(answers), max(most)), (['a', 'b', 'c'], 1), door)
        begin = time.monotonic()
        server.hold_within = 0.1
        self.assertEqual(server.handle(*delivery(message(Content='slow')))[0], 503)
        self.assertLess(time.monotonic() - begin, 0.55)

    def test_an_answer_that_is_not_read_delays_no_other(self):
        # 看时间的线程来答的：正文几 MB，内核收不下，对方又不读。
        def respond(self, method, target, body, client, send, *more):
            def large(status, headers, body):
                body = b'x' * (8 << 20)
                send(status, [('Content-Length', str(len(body)))], body)
            return WeChatServer.respond(self, method, target, body, client, large, *more)
        self.answered_together(lambda server: setattr(server, 'respond', respond.__get__(server)), b'', 8 << 20)

    def test_a_byte_behind_the_body_delays_nobody(self):
        self.answered_together(lambda server: None, b'\n', 0)

    def answered_together(self, prepare, behind, size):
        """慢的回调，看时间的线程来答：第一个不读，也不断开；别的都按时得到 ``size`` 字节的正文。"""
        go, took = threading.Event(), []
        server = make_server(lambda msg: go.wait(5) and None, type('S', (Hasty,), {'hold_within': 3}), secret='s')
        server.client.trusted = True
        prepare(server)
        address = server.start('127.0.0.1', 0)
        self.addCleanup(server.stop)

        def read(sock):
            data = b''.join(iter(lambda: sock.recv(1 << 20), b''))
            took.append((len(data.partition(b'\r\n\r\n')[2]), time.monotonic() - begin))
        held = []
        for _ in range(5):
            held.append(socket.create_connection(address, 3))
            self.addCleanup(held[-1].close)
        begin = time.monotonic()
        for sock in held:
            method, target, body = delivery(message(Content='x'))
            head = 'POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n' % (target, len(body))
            sock.sendall(head.encode() + body + behind)
            time.sleep(0.02)
        threads = [threading.Thread(target=read, args=(sock,), daemon=True) for sock in held[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4)
        go.set()
        self.assertEqual([length for length, _ in took], [size] * 4)
        self.assertTrue(0.4 < min(t for _, t in took) and max(t for _, t in took) < 1.2, took)

    def test_a_second_stop_leaves_the_next_server_alone(self):
        server = make_server()
        server.start('127.0.0.1', 0)
        first = server._http
        server._http = None                     # stop() 在另一条线程上，还没有完
        address = server.start('127.0.0.1', 0)
        waiting = threading.Thread(target=server._wait)
        waiting.start()
        first.close(time.monotonic() + 1)
        server.finish(time.monotonic() + 1)
        waiting.join(0.5)
        self.assertTrue(waiting.is_alive())
        self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)
        server.stop()
        waiting.join(5)
        self.assertFalse(waiting.is_alive())

    def test_the_log_goes_where_the_config_says(self):
        logger = logging.getLogger('easywechat')
        before, logger.handlers = logger.handlers, []
        with tempfile.TemporaryDirectory() as folder:
            try:
                easywechat._log_to_file({'log_path': folder, 'log_name': 'x.log'})
                make_server().handle('GET', '/nosuch')
                logger.handlers[0].close()
                with open(os.path.join(folder, 'x.log'), encoding='utf-8') as f:
                    self.assertIn('expected /weixin', f.read())
                logger.handlers = []
                self.assertRaises(ConfigError, easywechat._log_to_file,
                                  {'log_path': os.path.join(folder, 'no'), 'log_name': ''})
            finally:
                logger.handlers = before

    def test_threads_return_to_rest(self):
        server, address = self.start()
        with swapped(easywechat._Seats, 'idle', 0.05):
            before = threading.active_count()
            for _ in range(5):
                ask_socket(address, *delivery(message(Content='x')))
            deadline = time.monotonic() + 5
            while threading.active_count() > before + 1 and time.monotonic() < deadline:
                time.sleep(0.01)
        self.assertLessEqual(threading.active_count(), before + 1)          # 看时间的那条
        self.assertEqual(threading.stack_size(), 0)

    @unittest.skipUnless(hasattr(signal, 'pthread_kill'), 'POSIX 的信号')
    def test_a_sigterm_is_not_lost_however_early_it_comes(self):
        # 主线程正要睡下的时候来的：处理函数还没有轮到跑，睡下了就没有人叫醒它。
        server, lost = make_server(), []
        for number in signal.SIGTERM, signal.SIGINT:
            self.addCleanup(signal.signal, number, signal.getsignal(number))

        def terminate(n):
            while signal.getsignal(signal.SIGTERM) is not signal.default_int_handler:
                time.sleep(0)
            then = time.perf_counter() + n * 2e-6
            while time.perf_counter() < then:
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            if not ended.wait(2):
                lost.append(n)
                server.stop()
        with contextlib.redirect_stderr(io.StringIO()):
            for n in range(100):
                ended = threading.Event()
                thread = threading.Thread(target=terminate, args=(n,))
                thread.start()
                try:
                    server.run('127.0.0.1', 0)
                except KeyboardInterrupt:
                    lost.append(n)
                ended.set()
                thread.join()
                self.assertEqual(lost, [])

    @unittest.skipUnless(hasattr(signal, 'pthread_kill'), 'POSIX 的信号')
    def test_a_sigterm_whose_exception_is_swallowed_still_ends_it(self):
        # 处理函数抛的异常落在一个 __del__ 里（垃圾回收不挑时候），就没有了。
        server, struck = make_server(), []
        for number in signal.SIGTERM, signal.SIGINT:
            self.addCleanup(signal.signal, number, signal.getsignal(number))

        class Finalized:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(1000):
                    pass

        def profile(*args):
            if not struck and signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
                struck.append(1)
                Finalized()
        timer, begin = threading.Timer(3, server.stop), time.monotonic()
        timer.start()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            sys.setprofile(profile)
            try:
                server.run('127.0.0.1', 0)
            finally:
                sys.setprofile(None)
        timer.cancel()
        self.assertIn('KeyboardInterrupt', err.getvalue())
        self.assertLess(time.monotonic() - begin, 2)

    @unittest.skipUnless(hasattr(signal, 'SIGUSR1'), 'POSIX 的信号')
    def test_the_signals_of_others_do_not_end_it(self):
        server, seen, got = make_server(), [], []
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGUSR1, lambda *args: seen.append(1))

        def talk():
            deadline = time.monotonic() + 5
            while signal.getsignal(signal.SIGTERM) is not signal.default_int_handler and time.monotonic() < deadline:
                time.sleep(0.001)
            for n in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
                while len(seen) <= n and time.monotonic() < deadline:
                    time.sleep(0.001)
                address = '127.0.0.1', int(re.search('1:([0-9]+)/', err.getvalue()).group(1))
                got.append(ask_socket(address, 'GET', '/weixin')[0])
            os.kill(os.getpid(), signal.SIGTERM)
        thread = threading.Thread(target=talk)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            thread.start()
            server.run('127.0.0.1', 0)
        thread.join()
        self.assertEqual(got, [200] * 3)

    @unittest.skipUnless(hasattr(signal, 'SIGUSR1'), 'POSIX 的信号')
    def test_a_wakeup_descriptor_of_the_host_is_put_back(self):
        read, write = socket.socketpair()
        with read, write:
            write.setblocking(False)
            signal.set_wakeup_fd(write.fileno())
            self.addCleanup(signal.set_wakeup_fd, -1)
            server = make_server()
            threading.Timer(0.1, server.stop).start()
            with contextlib.redirect_stderr(io.StringIO()):
                server.run('127.0.0.1', 0)
            self.assertEqual(signal.set_wakeup_fd(-1), write.fileno())

    @unittest.skipUnless(os.name == 'posix', 'POSIX 的信号')
    def test_a_second_signal_interrupts_nothing(self):
        code = ("import json, sys, time, easywechat\n"
                "server = easywechat.WeChatServer('x', **json.loads(sys.argv[1]))\n"
                "server.register_callback('*', lambda msg: print('run', flush=True) or time.sleep(0.7) or 'done')\n"
                "server.run('127.0.0.1', 0)\n")
        process = subprocess.Popen([sys.executable, '-c', code, json.dumps(SETTINGS)], cwd=HERE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=dict(os.environ, PYTHONIOENCODING='utf-8'))
        self.addCleanup(process.kill)
        with process.stdout, process.stderr:
            address = '127.0.0.1', int(re.search(rb':([0-9]+)/', process.stderr.readline()).group(1))
            answers = []
            thread = threading.Thread(target=lambda: answers.append(ask_socket(address, *delivery(message()))))
            thread.start()
            process.stdout.readline()
            for _ in range(3):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            thread.join(5)
            self.assertEqual((process.wait(5), process.stderr.read()), (0, b''))
        self.assertEqual(opened(answers[0][2])['Content'], 'done')

    @unittest.skipUnless(os.path.isdir('/proc/self/task'), '只有 Linux 数得出来')
    def test_at_rest_nothing_wakes_and_sigterm_ends_it_at_once(self):
        code = ("import json, sys, easywechat; easywechat._Seats.idle = 0.1\n"
                "server = easywechat.WeChatServer('x', **json.loads(sys.argv[1]))\n"
                "server.register_callback('*', lambda msg: msg)\n"
                "server.run('127.0.0.1', 0)\n")
        process = subprocess.Popen([sys.executable, '-c', code, json.dumps(SETTINGS)], cwd=HERE, stderr=subprocess.PIPE,
                                   env=dict(os.environ, PYTHONIOENCODING='utf-8'))
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        address = '127.0.0.1', int(re.search(rb':([0-9]+)/', process.stderr.readline()).group(1))

        def switches():
            """每条线程让出过几次 CPU。"""
            counts = {}
            for task in os.listdir('/proc/%d/task' % process.pid):
                with contextlib.suppress(OSError), open('/proc/%d/task/%s/status' % (process.pid, task)) as f:
                    counts[task] = re.findall(r'ctxt_switches:\s*(\d+)', f.read())
            return counts
        for text in 'abc':
            self.assertEqual(opened(ask_socket(address, *delivery(message(Content=text)))[2])['Content'], text)
        deadline = time.monotonic() + 5
        while len(switches()) > 2 and time.monotonic() < deadline:      # 看时间的、空闲的线程，过一会儿结束
            time.sleep(0.05)
        before = switches()
        time.sleep(2)
        self.assertEqual(switches(), before)
        self.assertEqual(opened(ask_socket(address, *delivery(message(Content='d')))[2])['Content'], 'd')
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(5), 0)
        self.assertLess(time.monotonic() - begin, 2)        # 平时 0.1 秒


@unittest.skipUnless(hasattr(os, 'fork'), '没有 fork')
class ForkTests(HastyCase):
    """fork 出来的进程里没有别的线程：它们拿着的锁、数着的数、答着的连接，都与它无关。"""

    def setUp(self):
        super().setUp()
        quiet = warnings.catch_warnings()           # 3.12 起：这个进程有几条线程
        quiet.__enter__()
        self.addCleanup(quiet.__exit__, None, None, None)
        warnings.simplefilter('ignore')
        self.wecom.patience = 3

    def fork(self, job):
        """在新的进程里 ``job()``：返回真的，退出码是 0；卡住了，十秒后被 SIGALRM 结束 → 进程号。"""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            signal.alarm(10)
            code = 0 if job() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def test_a_child_works_whatever_the_threads_of_its_parent_did(self):
        end, go = threading.Event(), threading.Event()
        self.addCleanup(end.set)
        self.addCleanup(go.set)
        files, memory = FileStore(os.path.join(self.folder, 'files')), MemoryStore()

        def callback(msg):
            return msg['Content'] if msg['Content'] != 'slow' else go.wait(20) and None
        server, url = self.server(callback, files)
        other, status, codes = make_server(store=files), [], []
        server.client.get_token()
        self.wecom.deliveries = 1

        def traffic(n):
            count = 0
            while not end.is_set():
                count += 1
                if n:
                    query, body = self.wecom.request(self.wecom.message(Content=str(n)))
                    status.append(server.handle('POST', '/weixin?' + query, body)[0])
                    memory.set('%d of %d' % (count, n), b'x')
                else:
                    other.start('127.0.0.1', 0)     # 每次都开新的线程
                    other.stop()

        def child(query, body, content):
            status, _, answer = server.handle('POST', '/weixin?' + query, body)
            memory.set(content, b'1')
            files.set(content, b'2')
            server.client.send(content, to='lisi')
            begin = time.monotonic()
            server.finish(begin + 1)                # 正在跑的是父进程的，不等它
            return ((status, self.wecom.opened(answer)['Content'], memory.get(content), files.get(content))
                    == (200, content, b'1', b'2') and time.monotonic() - begin < 0.5)

        def forks(n):
            for i in range(5):
                content = 'child %d of %d' % (i, n)
                query, body = self.wecom.request(self.wecom.message(Content=content))
                codes.append(os.waitpid(self.fork(lambda q=query, b=body, c=content: child(q, b, c)), 0)[1])
        slow = self.at_once(lambda content: self.wecom.deliver(url, Content=content), ['slow'])
        busy, forking = self.at_once(traffic, range(3)), self.at_once(forks, range(4))
        for thread in forking:
            thread.join(60)
        end.set()
        go.set()
        for thread in busy + slow:
            thread.join(10)
        self.assertEqual(codes, [0] * 20)
        self.assertEqual(set(status), {200})
        self.assertEqual(sorted(text for _, text in self.wecom.inbox['lisi']), [
            'child %d of %d' % (i, n) for i in range(5) for n in range(4)])

    def test_a_child_keeps_no_connection_open(self):
        go, begun, children = threading.Event(), threading.Event(), []
        self.addCleanup(go.set)

        def callback(msg):
            if msg['Content'] == 'waits':
                begun.set()
                go.wait(10)
            else:
                children.append(self.fork(lambda: time.sleep(9)))
                self.addCleanup(self.end, children[-1])
            return msg['Content']
        parts, answers = urllib.parse.urlsplit(self.server(callback, secret='')[1]), []

        def ask(text):
            query, body = self.wecom.request(self.wecom.message(Content=text))
            answer = ask_socket((parts.hostname, parts.port), 'POST', '/weixin?' + query, body)     # 读到断开为止
            answers.append((answer[0], self.wecom.opened(answer[2])['Content']))
        waiting = self.at_once(ask, ['waits'])
        begun.wait(5)
        begin = time.monotonic()
        ask('forks')
        go.set()
        waiting[0].join(5)
        self.assertEqual(answers, [(200, 'forks'), (200, 'waits')])
        self.assertLess(time.monotonic() - begin, 1)
        self.assertEqual(os.waitpid(children[0], os.WNOHANG), (0, 0))       # 它还活着

    def test_without_a_thread_a_connection_is_closed_and_nothing_starts(self):
        def fails(*args):
            raise RuntimeError("can't start new thread")

        def works():                    # 新的进程里没有空闲的线程
            server, other = make_server(), make_server()
            address = server.start('127.0.0.1', 0)
            with swapped(threading.Thread, 'start', fails):
                self.assertEqual(ask_socket(address, 'GET', '/weixin'), (0, {}, b''))
                self.assertRaises(RuntimeError, other.start, '127.0.0.1', 0)
            self.assertEqual(ask_socket(address, 'GET', '/weixin')[0], 200)
            other.start('127.0.0.1', 0)         # 那一次什么也没有开始
            return True
        self.assertEqual(os.waitpid(self.fork(works), 0)[1], 0)

    @unittest.skipUnless(hasattr(os, 'register_at_fork'), '3.6 没有')
    def test_a_lock_that_was_held_is_free_in_a_child(self):
        store, crypt = MemoryStore(), WXBizMsgCrypt(SETTINGS['token'], SETTINGS['encoding_aes_key'], '')
        with store._lock, crypt._lock:
            child = self.fork(lambda: store.set('a', b'1') and crypt.open(crypt.seal('x')) == 'x')
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_where_no_thread_starts_nobody_waits_for_ever(self):
        def fails(*args):
            raise RuntimeError("can't start new thread")

        def works():
            server = make_server(lambda msg: 'x', Hastier)
            with swapped(threading.Thread, 'start', fails):
                return server.handle(*delivery(message()))[0] == 503
        self.assertEqual(os.waitpid(self.fork(works), 0)[1], 0)

    def test_few_descriptors_are_few_connections(self):
        resource = __import__('resource')

        def works():
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            server = make_server(cls=type('Server', (WeChatServer,), {'head_within': 30}))
            address = server.start('127.0.0.1', 0)
            idle = [socket.create_connection(address) for _ in range(60)]       # 200 的四分之一是 50
            idle[0].settimeout(5)
            return idle[0].recv(1) == b'' and ask_socket(address, 'GET', '/weixin')[0] == 200
        self.assertEqual(os.waitpid(self.fork(works), 0)[1], 0)

    def test_threads_have_a_stack_of_a_megabyte(self):
        sizes, real = [], threading.stack_size

        def stack_size(*args):
            sizes.append(args)
            return real(*args)

        def works():
            with swapped(threading, 'stack_size', stack_size):
                make_server().start('127.0.0.1', 0)
            return sizes == [(1 << 20,), (0,)]
        self.assertEqual(os.waitpid(self.fork(works), 0)[1], 0)

    def test_a_child_has_a_loop_of_its_own(self):
        async def callback(msg):
            return str(os.getpid())
        server = make_server(callback)

        def works():
            return opened(server.handle(*delivery(message(Content='?')))[2])['Content'] == str(os.getpid())
        self.assertTrue(works())
        child = self.fork(works)
        self.assertEqual(os.waitpid(child, 0), (child, 0))
        self.assertTrue(works())        # 父进程的还好好的

    def test_a_child_keeps_no_lock(self):
        folder = os.path.join(self.folder, 'locks')
        store = FileStore(folder)

        def free():
            begin = time.monotonic()
            with FileStore(folder).lock('a', 0.4):
                return time.monotonic() - begin < 0.3
        with store.lock('a'):
            child = self.fork(lambda: time.sleep(9))
            self.addCleanup(self.end, child)
            self.assertNotEqual(os.waitpid(self.fork(free), 0)[1], 0)
        self.assertEqual(os.waitpid(self.fork(free), 0)[1], 0)
        self.assertTrue(free())
        self.assertEqual(os.waitpid(child, os.WNOHANG), (0, 0))

    def test_a_child_may_stop_and_start_the_server_and_its_parent_goes_on(self):
        go, begun = threading.Event(), threading.Event()
        self.addCleanup(go.set)
        server, url = self.server(lambda msg: begun.set() or go.wait(20) and None if 'Content' in msg else 'x')
        server.stop_within = 1.5
        slow = self.at_once(lambda text: self.wecom.deliver(url, Content=text), ['slow'])
        begun.wait(5)

        def job():
            begin = time.monotonic()
            server.stop()
            address = server.start('127.0.0.1', 0)
            status = ask_socket(address, 'GET', '/weixin')[0]
            server.stop()
            return status == 200 and time.monotonic() - begin < 1
        for _ in range(3):
            self.assertEqual(self.wecom.deliver(url)['Content'], 'x')
            self.assertEqual(os.waitpid(self.fork(job), 0)[1], 0)
        self.assertEqual(self.wecom.deliver(url)['Content'], 'x')
        go.set()
        slow[0].join(5)


# ---- 长连接 WebSocket -------------------------------------------------------------------------

class Peer:
    """照脚本说话的 WebSocket 服务器：``talk(peer)`` 在握手以后跑，``self.sock`` 是那条连接。"""

    def __init__(self, case, talk, answer=None, context=None):
        self.talk, self.answer, self.context, self.asked, self.failure = talk, answer, context, [], None
        self.listener = socket.socket()
        self.listener.bind(('127.0.0.1', 0))
        self.listener.listen(5)
        case.addCleanup(self.listener.close)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        self.port = self.listener.getsockname()[1]
        self.url = '%s://127.0.0.1:%d/a?b=c' % ('wss' if context else 'ws', self.port)

    def head(self):
        data = b''
        while not data.endswith(b'\r\n\r\n'):
            data += self.sock.recv(1) or b'\r\n\r\n'
        self.asked.append(data.decode())
        return self.asked[-1]

    def serve(self):
        with contextlib.suppress(OSError):
            self.sock = self.listener.accept()[0]
            if self.context:
                self.sock = self.context.wrap_socket(self.sock, server_side=True)
            with self.sock:
                key = re.search('Sec-WebSocket-Key: (.*)\r', self.head()).group(1)
                accept = hashlib.sha1((key + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').encode()).digest()
                answer = self.answer or ('HTTP/1.1 101 Switching Protocols\r\nUPGRADE: WebSocket\r\n'
                                         'Connection: keep-alive, Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n')
                self.sock.sendall(answer.replace('{}', binascii.b2a_base64(accept, newline=False).decode()).encode())
                self.talk(self)

    def frame(self, opcode, data=b'', final=True, mask=False):
        masked = easywechat._masked(data, b'abcd') if mask else data
        size = bytes([len(data)]) if len(data) < 126 else b'\x7e' + struct.pack('>H', len(data))
        size = bytes([size[0] | mask * 128]) + size[1:]
        self.sock.sendall(bytes([opcode | final * 128]) + size + (b'abcd' if mask else b'') + masked)

    def read(self):
        """→（类型，内容）；客户端的每一帧都要有掩码。"""
        head = self.take(2)
        size = head[1] & 127
        if size > 125:
            size, = struct.unpack('>H' if size == 126 else '>Q', self.take(2 if size == 126 else 8))
        assert head[1] & 128 and head[0] & 128
        mask = self.take(4)
        return head[0] & 15, easywechat._masked(self.take(size), mask)

    def take(self, count):
        data = b''
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data


class WebSocketTests(unittest.TestCase):

    def dial(self, talk, **kwargs):
        self.peer = Peer(self, talk, **kwargs)
        ws = easywechat._WebSocket(self.peer.url, within=5)
        self.addCleanup(ws.close)
        self.addCleanup(ws.hang_up)
        return ws

    def test_messages_go_both_ways_whatever_comes_between(self):
        seen = []

        def talk(peer):
            seen.append(peer.read())
            seen.append(peer.read())
            peer.frame(9, b'ping')
            peer.frame(1, '磁'.encode()[:2], final=False)
            peer.frame(10, b'', mask=True)      # 企业微信的网关，给 pong 加掩码
            peer.frame(9, b'inside', mask=True)
            peer.frame(0, '磁'.encode()[2:] + b'!' * 300)
            peer.frame(2, b'\xff\x00')
            seen.extend([peer.read(), peer.read()])
            peer.frame(8, struct.pack('>H', 1001) + '走了'.encode())
            seen.append(peer.read())
        ws = self.dial(talk)
        ws.send('x' * 70000)
        ws.send(b'')
        self.assertEqual(ws.receive(5), '磁' + '!' * 300)
        self.assertEqual(ws.receive(5), b'\xff\x00')
        with self.assertRaises(easywechat._Closed) as caught:
            ws.receive(5)
        self.assertEqual(caught.exception.args, (1001, '走了'))
        self.peer.thread.join(5)
        self.assertEqual(seen, [(1, b'x' * 70000), (2, b''), (10, b'ping'), (10, b'inside'), (8, b'\x03\xe9')])
        self.assertRaises(OSError, ws.send, 'late')
        self.assertRegex(self.peer.asked[0], r'\AGET /a\?b=c HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n' % self.peer.port)
        self.assertNotIn('Extensions', self.peer.asked[0])

    def test_what_is_no_websocket_is_named(self):
        good = 'HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n'
        for what, answer in (
                ('404', 'HTTP/1.1 404 Not Found\r\n\r\n'), ('no HTTP', 'SSH-2.0-x\r\n\r\n'),
                ('a wrong key', good.replace('{}', 'x') + '\r\n'), ('no end of it', 'x' * 20000),
                ('an extension', good + 'Sec-WebSocket-Extensions: x\r\n\r\n'),
                ('a protocol', good + 'Sec-WebSocket-Protocol: x\r\n\r\n'),
                ('no upgrade', good.replace('Connection: Upgrade\r\n', '') + '\r\n')):
            with self.subTest(what), self.assertRaises(OSError):
                self.dial(lambda peer: peer.sock.recv(1), answer=answer)
        self.dial(lambda peer: peer.sock.recv(1), answer=good + '\r\n')

    def test_a_violation_ends_it_with_its_code(self):
        for what, code, frames in (
                ('a reserved bit', 1002, [b'\xc1\x00']), ('an unknown opcode', 1002, [b'\x83\x00']),
                ('a mask', 1002, [b'\x81\x81abcdx']),
                ('a long ping', 1002, [b'\x89\x7e\x00\x7e' + b'x' * 126]), ('a ping in pieces', 1002, [b'\x09\x00']),
                ('no beginning', 1002, [b'\x80\x00']), ('two beginnings', 1002, [b'\x01\x01a', b'\x81\x01b']),
                ('no UTF-8', 1007, [b'\x81\x02\xc3\x28']), ('half a character', 1007, [b'\x81\x01\xe7']),
                ('too large', 1009, [b'\x82\x7f' + struct.pack('>Q', 5 << 20)]),
                ('a close of one byte', 1002, [b'\x88\x01x']),
                ('a reserved close code', 1002, [b'\x88\x02' + struct.pack('>H', 1005)])):
            with self.subTest(what):
                got = []

                def talk(peer, frames=frames, got=got):
                    peer.sock.sendall(b''.join(frames))
                    got.append(peer.read())
                ws = self.dial(talk)
                with self.assertRaises(easywechat._Closed) as caught:
                    ws.receive(5)
                self.peer.thread.join(5)
                opcode, data = got[0]
                self.assertEqual((caught.exception.args[0], opcode, data[:2]), (code, 8, struct.pack('>H', code)))

    def test_an_end_without_a_word_and_silence(self):
        ws = self.dial(lambda peer: peer.sock.recv(1))
        before = ws.heard
        self.assertIsNone(ws.receive(0.05))
        self.assertEqual(ws.heard, before)
        threading.Timer(0.1, ws.hang_up).start()        # 别的线程叫醒它
        with self.assertRaises(OSError):
            ws.receive(20)
        ws = self.dial(lambda peer: None)
        with self.assertRaises(easywechat._Closed) as caught:
            ws.receive(5)
        self.assertEqual(caught.exception.args[0], 1006)

    def test_half_a_frame_is_the_end_of_it(self):
        ws = self.dial(lambda peer: time.sleep(5))
        ws._within, ws.slowest = 0.2, 1 << 30
        with self.assertRaises(OSError):
            for _ in range(20):
                ws.send(b'x' * (4 << 20))
        self.assertRaises(OSError, ws.send, b'x')

    def test_through_a_proxy_and_tls(self):
        ssl, asked = __import__('ssl'), []
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'cert')
            with open(path, 'w') as f:
                f.write(CERTIFICATE + PRIVATE_KEY)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path)
            peer = Peer(self, lambda peer: peer.frame(*peer.read()), context=context)
            proxy = socket.socket()
            self.addCleanup(proxy.close)
            proxy.bind(('127.0.0.1', 0))
            proxy.listen(1)

            def relay():
                with proxy.accept()[0] as near, socket.create_connection(('127.0.0.1', peer.port)) as far:
                    data = b''
                    while not data.endswith(b'\r\n\r\n'):
                        data += near.recv(1)
                    asked.append(data.decode())
                    near.sendall(b'HTTP/1.1 200 Connection established\r\n\r\n')
                    back = threading.Thread(target=copy, args=(far, near), daemon=True)
                    back.start()
                    copy(near, far)
                    back.join(5)

            def copy(one, other):
                with contextlib.suppress(OSError):
                    for data in iter(lambda: one.recv(65536), b''):
                        other.sendall(data)
                    other.shutdown(socket.SHUT_WR)
            thread = threading.Thread(target=relay, daemon=True)
            thread.start()
            with environment(https_proxy='http://us%%40er:%s@127.0.0.1:%d' % (PLANTED, proxy.getsockname()[1])):
                ws = easywechat._WebSocket(peer.url, path, 5)
            self.addCleanup(ws.close)
            ws.send('through')
            self.assertEqual(ws.receive(5), 'through')
            ws.close()
            thread.join(5)
        self.assertTrue(asked[0].startswith('CONNECT 127.0.0.1:%d HTTP/1.1\r\n' % peer.port))
        self.assertIn(binascii.b2a_base64(('us@er:' + PLANTED).encode(), newline=False).decode(), asked[0])
        for variable in 'socks5://127.0.0.1:9', 'http://127.0.0.1:9':
            with environment(https_proxy=variable), self.assertRaises(OSError):
                easywechat._WebSocket(peer.url, within=2)


# ---- 信 Mail ----------------------------------------------------------------------------------

#: 别的程序写的信，照它们的样子 → 用户看到的第一条文本。
MAILS = {
    'cron': (b'From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@nas> /usr/local/bin/backup\nMIME-Version: 1.0\n'
             b'Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n'
             b'X-Cron-Env: <SHELL=/bin/sh>\n\n'
             b'rsync: No space left on device (28)\n',
             'Cron <root@nas> /usr/local/bin/backup\n来自 root (Cron Daemon)\n\nrsync: No space left on device (28)'),
    'smartd': (b'To: root\nSubject: SMART error (CurrentPendingSector) detected on host: nas\n\n'
               b'This message was generated by the smartd daemon running on:\n\n   host name:  nas\n\n'
               b'Device: /dev/sda [SAT], 8 Currently unreadable (pending) sectors\n',
               'SMART error (CurrentPendingSector) detected on host: nas\n\nThis message was generated by the smartd '
               'daemon running on:\n\n   host name:  nas\n\nDevice: /dev/sda [SAT], 8 Currently unreadable (pending) '
               'sectors'),
    'mdadm': (b'From: mdadm monitoring <root>\nTo: root\nSubject: Fail event on /dev/md0:nas\n\n'
              b'This is an automatically generated mail message from mdadm\nrunning on nas\n\n'
              b'A Fail event had been detected on md device /dev/md0.\n',
              'Fail event on /dev/md0:nas\n来自 mdadm monitoring <root>\n\nThis is an automatically generated mail '
              'message from mdadm\nrunning on nas\n\nA Fail event had been detected on md device /dev/md0.'),
    'zed': (b'To: root\nSubject: ZFS device fault for pool 0x33D on nas\n\nThe number of checksum errors is 10.\n',
            'ZFS device fault for pool 0x33D on nas\n\nThe number of checksum errors is 10.'),
    'unattended-upgrades': (
        b'Subject: [reboot required] unattended-upgrades result for nas: SUCCESS\nTo: root\nMIME-Version: 1.0\n'
        b'Content-Type: text/plain; charset="utf-8"\nContent-Transfer-Encoding: quoted-printable\n\n'
        b'Packages that were upgraded: =E5=86=85=E6=A0=B8\n linux-image =3D 6.1 and a very long li=\nne\n',
        '[reboot required] unattended-upgrades result for nas: SUCCESS\n\nPackages that were upgraded: 内核\n'
        ' linux-image = 6.1 and a very long line'),
    'logwatch': (b'To: root\nFrom: logwatch@nas\nSubject: Logwatch for nas\nMIME-Version: 1.0\n'
                 b'Content-Type: text/html; charset="iso-8859-1"\n\n<html><head><title>x</title>'
                 b'<style>p {}</style></head><body><h2>sshd</h2>\n'
                 b'<table><tr><td>Failed</td><td>3 &times;</td></tr><tr><td>ok&amp;so</td></tr></table>'
                 b'<a href="https://e.x/a">more</a><br>caf\xe9</body></html>\n',
                 'Logwatch for nas\n来自 logwatch@nas\n\nsshd\nFailed 3 ×\nok&so\nmore https://e.x/a\ncafé'),
    'synology': (('From: "=?UTF-8?B?5oiR55qETkFT?=" <nas@e.x>\nTo: a@e.x, b@e.x\nSubject: =?gb2312?B?tMXFzLjmvq8=?=\n'
                 ' =?UTF-8?Q?_=E2=9A=A0?=\nMIME-Version: 1.0\nContent-Type: multipart/alternative; boundary="=-b 1"\n\n'
                 'preamble\n--=-b 1\nContent-Type: text/plain; charset=gbk\nContent-Transfer-Encoding: base64\n\n'
                 'zqjSu7XEtL/OxLG+\n--=-b 1\nContent-Type: text/html\n\n<b>html</b>\n--=-b 1--\nepilogue\n').encode(),
                 '磁盘告警 ⚠\n来自 我的NAS <nas@e.x>\n\n唯一的纯文本'),
    'raw GBK, no charset': ('Subject: 磁盘\n\n满了\n'.encode('gb18030'), '磁盘\n\n满了'),
    'raw UTF-8': ('Subject: 磁盘\nContent-Type: text/plain; charset=us-ascii\n\n满了\n'.encode(), '磁盘\n\n满了'),
    'no header': (b'\nhello\n', 'hello'),
    'only a text': (b'disk full\nand: more\n', 'disk full\nand: more'),
    'a text behind a header': (b'Subject: x\nno header\n\nbody\n', 'x\n\nno header\n\nbody'),
    'a part without a blank line': (
        b'Subject: x\nContent-Type: multipart/mixed; boundary=A\n\n--A\nContent-Type: text/plain\n'
        b'--A\nContent-Type: text/plain\n\nreal\n--A--\n', 'x\n\nreal'),
    'a text that looks like a header': (b'error: disk full\n\nmore\n', 'error: disk full\n\nmore'),
    'no body': (b'Subject: x\n', 'x'),
    'a link': (b'Subject: <a href="http://evil.example">x</a>\n\n<A HREF=y>z</A> <root@nas>\n',
               '\uff1ca href="http://evil.example">x\uff1c/a>\n\n\uff1cA HREF=y>z\uff1c/A> <root@nas>'),
    'a broken boundary': (b'Subject: x\nContent-Type: multipart/mixed\n\n--a\ntext\n', 'x\n\n--a\ntext'),
    'a broken encoding': (b'Subject: =?utf-8?B?!!!?=\nContent-Transfer-Encoding: base64\n\n====\nYWJj\n@@@\n', 'abc'),
}


class Hurried(WeChatServer):
    """时限都缩短了的智能机器人。"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, value in (('pause', 0.01), ('pause_most', 0.1), ('steady_after', 1), ('slow_pause', 0.2),
                            ('slow_pause_most', 5), ('ack_within', 0.5), ('chunk_within', 1), ('slow_after', 0.15),
                            ('frame_every', 0.03), ('busy_pause', 0.05), ('offline_within', 0.5), ('ping_every', 0.2),
                            ('silent_within', 0.5), ('clash_pause', 0.01), ('connect_within', 2),
                            ('hand_over_within', 5)):
            setattr(self.bot, name, value)
        self.answer_within = 0.3        # 看时间的线程隔它的三分之一看一次


class BotCase(ClientCase):
    """智能机器人，连着 `examples/simulator.py`。"""

    def setUp(self):
        super().setUp()
        self.bot = self.wecom.bot
        self.bot.subscribes = self.bot.per_minute = 1000
        SECRETS.add(self.wecom.bot_settings['bot_secret'])

    def server(self, callback=None, cls=Hurried, start=True, **settings):
        server = cls('test', **dict(self.wecom.bot_settings, **settings))
        if callback:
            server.register_callback('*', callback)
        if start:
            self.assertIsNone(server.start())       # 不听 HTTP
            self.addCleanup(server.stop)
            self.assertTrue(server.bot._session.wait(5))
        return server

    def until(self, condition):
        """等到 ``condition()`` → 它的值。"""
        deadline = time.monotonic() + 5
        while not condition():
            self.assertLess(time.monotonic(), deadline, '等不到')
            time.sleep(0.002)
        return condition()

    def see(self, count, **fields):
        """等到用户看到 ``count`` 个写完了的气泡、消息 → 它们的文字。"""
        def found():
            done = [b['text'] for b in self.bot.bubbles if b['finished'] and all(b[k] == v for k, v in fields.items())]
            return done if len(done) >= count else None
        return self.until(found)


class BotTests(BotCase):

    def run_once(self, callback, event=None, **settings):
        """一条消息 → 用户看到的 [（怎样来的，类型，文字）]。"""
        ran = threading.Event()

        def counted(msg):
            ran.set()
            return callback(msg) if callable(callback) else callback
        server = self.server(counted, **settings)
        event(self.bot) if event else self.bot.say('zhangsan', '你好')
        self.assertTrue(ran.wait(5))
        self.until(lambda: not server._once._runs and not server._left())
        self.assertEqual([b for b in self.bot.bubbles if not b['finished']], [])
        server.stop()
        return [(b['how'], b['kind'], b['text']) for b in self.bot.bubbles]

    def test_messages_have_the_names_of_the_app(self):
        got = []
        server = self.server(got.append)
        png = b'\x89PNG\r\n\x1a\n' + bytes(200)
        self.bot.say('zhangsan', '你好', quote='旧的')
        self.bot.say('lisi', ' 状态\u2005', chat='group')
        self.bot.say('zhangsan', voice='明天见')
        self.bot.say('zhangsan', image=png)
        self.bot.say('zhangsan', file=('报告.py', b'print()'))
        self.bot.say('zhangsan', mixed=['看', png, '图'])
        self.bot.enter('zhangsan')
        self.until(lambda: len(got) == 7)
        by_kind = {msg['MsgType'] + msg['ChatType'] * (msg['ChatType'] == 'group'): msg for msg in got}
        text, group, voice, image, file, mixed, event = (by_kind[k] for k in (
            'text', 'textgroup', 'voice', 'image', 'file', 'mixed', 'event'))
        self.assertEqual((text['Content'], text['FromUserName'], text['ChatId'], text['text']['content']),
                         ('你好', 'zhangsan', '', '你好'))
        self.assertEqual(text['ToUserName'], text['AgentID'])
        self.assertEqual((text['ToUserName'], text['MsgId']), (text['aibotid'], text['msgid']))
        self.assertEqual((text['Quote']['MsgType'], text['Quote']['Content']), ('text', '旧的'))
        self.assertRegex(text['CreateTime'], '^[0-9]{10}$')
        self.assertEqual((group['Content'].strip(), group['ChatId']), ('状态', self.bot.group))
        self.assertIn('@', group['text']['content'])
        self.assertEqual(voice['Recognition'], '明天见')
        self.assertTrue(image['PicUrl'].startswith('http'))
        self.assertEqual(mixed['Content'], '看\n图')
        self.assertEqual([i['MsgType'] for i in mixed['MsgItems']], ['text', 'image', 'text'])
        self.assertEqual((event['Event'], event['EventKey']), ('enter_chat', ''))
        folder = os.path.join(self.folder, 'downloads')
        os.mkdir(folder)
        for msg in image, mixed['MsgItems'][1]:
            with open(str(server.download(msg, folder)), 'rb') as f:
                self.assertEqual(f.read(), png)
        path = server.download(file, folder)
        self.assertEqual((os.fsencode(path.name), path.stat().st_size), ('报告.py_'.encode(), 7))    # Python 会运行的
        for wrong in text, mixed:
            self.assertRaises(ValueError, server.download, wrong, folder)
        self.bot.skip(301)              # 五分钟
        with self.assertRaises(NetworkError):
            server.download(image, folder)
        self.assertEqual(len(os.listdir(folder)), 3)

    def test_a_file_that_was_cut_or_has_another_key_is_refused(self):
        aes, key = easywechat._aes(), bytes(range(32))
        for size in 0, 5, 31, 32, 100, 70000:
            data = os.urandom(size)
            padding = 32 - size % 32
            sealed = aes.new(key, aes.MODE_CBC, key[:16]).encrypt(data + bytes([padding]) * padding)
            for step in 1, 7, 1 << 16:
                blocks = [sealed[n:n + step] for n in range(0, len(sealed), step)]
                self.assertEqual(b''.join(easywechat._aes_blocks(blocks[:200] + [b''.join(blocks[200:])], key)), data)
            for wrong in sealed[:-1], sealed[:16], b'', sealed + b'x' * 7:
                self.assertRaises(CryptoError, list, easywechat._aes_blocks([wrong], key))
        with self.assertRaises(CryptoError):
            for _ in range(20):                 # 碰巧像填充的，二百五十六次里一次
                list(easywechat._aes_blocks([sealed], bytes(32)))
                sealed = sealed[:-32] + os.urandom(32)

    def test_mention_is_taken_off(self):
        for text, name, content in (
                ('@小助手 状态', '小助手', '状态'), ('@小助手\u2005状态', '', '状态'),
                ('状态 @小助手', '小助手', '状态'), ('状态', '', '状态'), ('a@b.c 写信', '', 'a@b.c 写信'),
                ('@小助手', '小助手', ''), ('@我的 助手 你好', '我的 助手', '你好'),
                ('@小助手们 好', '小助手', '@小助手们 好'), ('问 @小助手 一下', '小助手', '问 @小助手 一下')):
            self.assertEqual(easywechat._without_mention(text, name), content)

    def test_what_arrives_may_be_anything(self):
        for body in ({}, {'msgtype': 5, 'from': 'x', 'chatid': None}, {'msgtype': 'mixed', 'mixed': {'msg_item': 3}},
                     {'msgtype': 'text', 'text': []},
                     {'msgtype': 'event', 'event': {'eventtype': 'disconnected_event'}},
                     {'msgtype': 'event', 'event': 'x'}, {'msgtype': 'image', 'image': {'url': 5}, 'quote': {}},
                     {'msgtype': 'event', 'event': {'eventtype': 'feedback_event', 'id': 'F', 'type': 2}}):
            msg = easywechat._bot_message(body)
            self.assertTrue(all(isinstance(msg[k], str) for k in (
                'MsgType', 'MsgId', 'FromUserName', 'ToUserName', 'ChatId', 'ChatType', 'CreateTime', 'AgentID')), body)
        self.assertEqual((msg['Id'], msg['Type']), ('F', '2'))

    def test_results_reach_the_user(self):
        image, pdf = self.file('cam.png'), self.file('a.pdf', 700000)
        card = {'msgtype': 'template_card', 'template_card': {
            'card_type': 'text_notice', 'main_title': {'title': '告警'},
            'card_action': {'type': 1, 'url': 'https://e.x'}}}
        news = {'MsgType': 'news', 'Articles': [{'Title': '一', 'Description': '二', 'Url': 'https://e.x'}]}

        async def wait(msg):
            return '等到了'

        def each(msg):
            yield '一'
            yield image
            yield ['二', None, {'msgtype': 'markdown', 'markdown': {'content': '**三**'}}]
        bubble = ('reply', 'stream')
        for result, seen in (
                (None, []), ('一句话', [bubble + ('一句话',)]), (lambda msg: msg, [bubble + ('你好',)]),
                ({'Content': '应用的写法'}, [bubble + ('应用的写法',)]), (wait, [bubble + ('等到了',)]),
                (each, [bubble + ('一',), ('reply', 'image', 'cam.png'), ('reply', 'markdown', '二'),
                        ('reply', 'markdown', '**三**')]),
                (pdf, [('reply', 'file', 'a.pdf')]), (card, [('reply', 'template_card', '告警')]),
                (news, [bubble + ('[一](https://e.x)\n二',)]),
                (lambda msg: Stream(iter(['一', '', '二'])), [bubble + ('一二',)]),
                ('长' * 8000, [bubble + ('长' * 6826,), ('reply', 'markdown', '长' * 1174)])):
            with self.subTest(result):
                self.bot.bubbles.clear()
                self.assertEqual(self.run_once(result), seen)
        self.assertEqual(self.bot.problems, [])

    def test_wrong_results_are_logged_and_the_others_arrive(self):
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.assertEqual(self.run_once(lambda msg: ['一', 5, {'msgtype': 'miniprogram_notice',
                                                                'miniprogram_notice': {}}, '', '二']),
                             [('reply', 'stream', '一'), ('reply', 'markdown', '二')])
        self.assertEqual(len(logs.output), 3)

    def test_an_open_bubble_is_always_closed(self):
        def slow(result):
            def callback(msg):
                self.until(lambda: any(b['text'] == '<think></think>' for b in self.bot.bubbles))
                if isinstance(result, BaseException):
                    raise result
                return result
            return callback
        def late():
            self.until(lambda: any(b['text'] == '<think></think>' for b in self.bot.bubbles))
            yield '好了'
        image, stream = self.file('cam.png'), easywechat.Stream
        self.assertEqual(self.run_once(lambda msg: stream(late())), [('reply', 'stream', '好了')])
        with self.assertLogs('easywechat', 'ERROR'):
            for result, seen in (
                    ('好了', [('stream', '好了')]), (None, [('stream', '（没有回复）')]),
                    ('', [('stream', '出错了')]), (ValueError('x'), [('stream', '出错了')]),
                    (SystemExit(1), [('stream', '出错了')]), (stream([]), [('stream', '（没有回复）')]),
                    (image, [('stream', '（见下一条）'), ('image', 'cam.png')]),
                    (stream(['一', 5]), [('stream', '一\n\n（出错了）')]),
                    (stream([' \n']), [('stream', '（没有回复）')]),
                    (['甲', '乙'], [('stream', '甲'), ('markdown', '乙')])):
                with self.subTest(result):
                    self.bot.bubbles.clear()
                    self.assertEqual([seen[1:] for seen in self.run_once(slow(result))], seen)
        self.assertEqual(self.bot.problems, [])

    def test_the_placeholder_can_be_changed(self):
        def slow(msg):
            time.sleep(0.3)
            return '好了'
        for placeholder, first in (('稍等', '稍等'), ('', '好了')):
            self.bot.frames.clear()
            self.run_once(slow, bot_placeholder=placeholder)
            frames = [f['frame']['body']['stream']['content'] for f in self.bot.frames
                      if f['frame'].get('cmd') == 'aibot_respond_msg']
            self.assertEqual((frames[0], frames[-1], len(frames)), (first, '好了', 1 + bool(placeholder)))

    def test_stop_closes_a_bubble(self):
        server = self.server(lambda msg: time.sleep(5))
        server.stop_within = 0.3
        self.bot.say('zhangsan', '你好')
        self.until(lambda: self.bot.bubbles)
        with self.assertLogs('easywechat', 'WARNING'):
            server.stop()
        self.assertEqual(self.see(1), ['（没有回复）'])

    def test_a_stream_grows(self):
        more = threading.Semaphore(0)

        def pieces():
            for n in range(3):
                more.acquire(timeout=5)
                yield '字%d ' % n

        async def later():
            for piece in pieces():
                yield piece
        for make in pieces, later:
            self.bot.bubbles.clear()
            server = self.server(lambda msg, make=make: Stream(make()))
            self.bot.say('zhangsan', '你好')
            for n in range(3):
                more.release()
                self.until(lambda n=n: self.bot.bubbles and '字%d' % n in self.bot.bubbles[0]['text'])
            self.assertEqual(self.see(1), ['字0 字1 字2 '])
            server.stop()

    def test_a_stream_of_many_pieces_is_few_frames(self):
        seen = self.run_once(lambda msg: Stream('%d ' % n for n in range(1000)))
        self.assertEqual(seen[0][2].split()[-1], '999')
        self.assertLess(self.bot.bubbles[0]['frames'], 4)

    def test_what_is_too_long_for_a_bubble_follows(self):
        text = '\n\n'.join('第 %d 段%s' % (n, '字' * 500) for n in range(30))
        seen = self.run_once(lambda msg: Stream(text[n:n + 100] for n in range(0, len(text), 100)))
        self.assertEqual(''.join(seen[2] for seen in seen).replace('\n', ''), text.replace('\n', ''))
        self.assertGreater(len(seen), 2)

    def test_a_bubble_that_is_too_old_is_closed_and_the_rest_pushed(self):
        def pieces():
            yield '前半'
            self.until(lambda: self.bot.bubbles and self.bot.bubbles[0]['finished'])
            yield '后半'
        server = self.server(lambda msg: Stream(pieces()))
        server.bot.bubble_within = 0.2
        self.bot.say('zhangsan', '你好')
        self.assertEqual(self.see(2), ['前半…', '后半'])
        self.assertEqual(self.bot.bubbles[1]['how'], 'push')

    def test_a_slow_callback_gives_up_its_bubble_in_time(self):
        def slow(msg):
            self.until(lambda: self.bot.bubbles and self.bot.bubbles[0]['finished'])
            return '终于'
        server = self.server(slow)
        server.bot.bubble_within = 0.3
        self.bot.say('zhangsan', '你好')
        self.assertEqual(self.see(2), ['（还没有好，好了再发）', '终于'])

    def test_refused_frames(self):
        for code, how in ((6000, 'reply'), (846605, 'push'), (846608, 'push'), (45009, 'reply')):
            with self.subTest(code):
                self.bot.bubbles.clear()
                self.bot.fault('error', code, cmd='aibot_respond_msg')
                self.assertEqual([seen[::2] for seen in self.run_once('好')], [(how, '好')])
        self.bot.bubbles.clear()
        self.bot.fault('error', 6000, times=4, cmd='aibot_respond_msg')
        self.assertEqual([seen[::2] for seen in self.run_once('好')], [('push', '好')])
        for code, user in (45009, 'lisi'), (846605, 'wangwu'):
            self.bot.bubbles.clear()
            self.bot.fault('error', code, cmd='aibot_respond_msg')
            self.assertEqual([seen[::2] for seen in self.run_once(self.file('a.pdf'))], [('push', 'a.pdf')])
            self.bot.bubbles.clear()
            self.bot.met.add(user)
            self.bot.fault('error', code, cmd='aibot_respond_welcome_msg')
            self.assertEqual([seen[::2] for seen in self.run_once('欢迎', lambda bot, user=user: bot.enter(user))],
                             [('push', '欢迎')])
        self.bot.fault('error', 40058, cmd='aibot_respond_msg')
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.run_once('好')
        self.assertIn('not delivered', logs.output[0])

    def test_no_acknowledgement_is_no_second_message(self):
        self.bot.fault('no_ack', cmd='aibot_respond_msg')
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.assertEqual(len(self.run_once('好')), 1)
        self.assertIn('may have been delivered', logs.output[0])
        self.bot.fault('no_ack', cmd='aibot_send_msg')
        with self.assertRaises(NetworkError) as raised:
            self.server().send('推送', to='zhangsan')
        self.assertTrue(raised.exception.maybe_sent)

    def test_who_waits_for_a_free_callback_sees_a_sign_of_life(self):
        go = threading.Event()
        server = self.server(lambda msg: go.wait(5) and msg['Content'])
        server.max_callbacks = 1
        for text in '一', '二':
            self.bot.say('zhangsan', text)
        self.until(lambda: [b['text'] for b in self.bot.bubbles] == ['<think></think>'] * 2)
        go.set()
        self.assertEqual(sorted(self.see(2)), ['一', '二'])

    def test_a_repeated_message_runs_once(self):
        runs = []

        def count(msg):
            runs.append(msg['MsgId'])
            return '好'
        self.bot.fault('duplicate')
        self.run_once(count)
        self.assertEqual((len(runs), len(self.bot.bubbles)), (1, 1))

    def test_events(self):
        self.assertEqual(self.run_once('欢迎', lambda bot: bot.enter('zhangsan')), [('welcome', 'text', '欢迎')])
        self.bot.bubbles.clear()
        self.bot.met.add('lisi')
        self.assertEqual(self.run_once(['欢迎', '再来一条'], lambda bot: bot.enter('lisi')),
                         [('welcome', 'text', '欢迎'), ('push', 'markdown', '再来一条')])

    def card(self):
        return {'msgtype': 'template_card', 'template_card': {
            'card_type': 'button_interaction', 'main_title': {'title': '告警'}, 'task_id': 'T1',
            'button_list': [{'text': '确认', 'key': 'ok', 'style': 1}]}}

    def test_cards_are_updated(self):
        done = {'card_type': 'text_notice', 'main_title': {'title': '已确认'}}
        got = []

        def answer(msg):
            got.append(msg)
            if msg['MsgType'] == 'text':
                return self.card()
            return [dict({'template_card': done}, response_type='update_template_card'), '记下了']
        server = self.server(answer)
        self.bot.say('zhangsan', '卡片')
        self.see(1)
        self.bot.press(self.bot.bubbles[0], 'ok')
        self.assertEqual(self.see(2), ['已确认', '记下了'])
        self.assertEqual((got[1]['Event'], got[1]['EventKey'], got[1]['TaskId']), ('template_card_event', 'ok', 'T1'))
        server.stop()
        late = self.server(lambda msg: {'MsgType': 'update_template_card', 'TemplateCard': {'CardType': 'text_notice'}})
        late.bot.event_within = 0
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.bot.event('template_card_event', 'zhangsan', event_key='ok', task_id='T')
            self.until(lambda: logs.output)
        self.assertIn('too late', logs.output[0])


class LineTests(BotCase):
    """断了，慢了，不对了：都自己回来，答复不丢，不重。"""

    def setUp(self):
        super().setUp()
        self.quiet = self.enterContext(self.assertLogs('easywechat')) if hasattr(self, 'enterContext') else None
        if not self.quiet:
            logs = self.assertLogs('easywechat')
            self.quiet = logs.__enter__()
            self.addCleanup(logs.__exit__, None, None, None)
        easywechat.logger.info('the test begins')

    def log(self):
        return '\n'.join(self.quiet.output)

    def back(self, number):
        """等到连上了第 ``number`` 条连接。"""
        self.until(lambda: self.bot.connected and self.bot.connected.number >= number)

    def test_it_comes_back_by_itself(self):
        server = self.server(lambda msg: '答 ' + msg['Content'])
        for n, (fault, value) in enumerate([
                ('close', 1000), ('close', 1001), ('close', 1011), ('abort', None), ('half_open', None),
                ('no_pong', None), ('error', 846609), ('kick', None), ('kick_open', None)], 1):
            with self.subTest(fault, value=value):
                number = self.bot.connected.number
                self.bot.bubbles.clear()
                if fault == 'error':
                    self.bot.fault(fault, value, cmd='aibot_respond_msg')
                    self.bot.say('zhangsan', '%d' % n)
                elif fault == 'no_pong':
                    self.bot.fault(fault)
                    self.until(lambda: not server.connected)
                    self.bot.heal()
                else:
                    self.bot.fault(fault, value)
                self.back(number + 1)
                if fault != 'error':
                    self.until(lambda: server.connected)
                    self.bot.say('zhangsan', '%d' % n)
                self.assertEqual(self.see(1), ['答 %d' % n])
                self.assertEqual(self.bot.bubbles[0]['how'], 'push' if fault == 'error' else 'reply')
        self.assertIn('long connection lost', self.log())
        self.assertIn('这个机器人在别处连上了', self.log())

    def test_a_refused_handshake_is_tried_again_for_ever(self):
        self.bot.fault('handshake', 503, times=12)
        server = self.server(start=False)
        server.start()
        self.addCleanup(server.stop)
        self.until(lambda: server.connected)
        self.assertIn('那里没有 WebSocket，回答的是 503', self.log())
        self.assertEqual(self.log().count('long connection failed'), 12)

    def relay(self, pause):
        """模拟器前面的一段慢的上行：每 16 KiB 停一停 → 它的 ws:// 网址。"""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        listener.bind(('127.0.0.1', 0))
        listener.listen(1)

        def run():
            with contextlib.suppress(OSError), listener.accept()[0] as near, socket.create_connection(
                    ('127.0.0.1', int(self.url.rpartition(':')[2]))) as far:
                def back():
                    with contextlib.suppress(OSError):
                        for data in iter(lambda: far.recv(1 << 16), b''):
                            near.sendall(data)
                threading.Thread(target=back, daemon=True).start()
                for data in iter(lambda: near.recv(1 << 14), b''):
                    far.sendall(data)
                    time.sleep(pause * len(data) / (1 << 14))
        threading.Thread(target=run, daemon=True).start()
        return 'ws://127.0.0.1:%d/aibot' % listener.getsockname()[1]

    def test_a_slow_uplink_loses_nothing(self):
        server = self.server(lambda msg: '答', bot_url=self.relay(0.008))        # 一块 0.35 秒
        self.bot.met.add('zhangsan')
        server.bot.silent_within, server.bot.ping_every = 0.8, 0.1
        upload = threading.Thread(target=server.bot.send, args=(self.file('big.bin', 1400000), 'zhangsan'))
        upload.start()
        self.bot.say('zhangsan', '你好')
        upload.join(20)
        self.assertEqual(sorted(self.see(2)), ['big.bin', '答'])
        commands = collections.Counter(f['frame'].get('cmd') for f in self.bot.frames)
        self.assertEqual((self.bot.connected.number, commands['aibot_upload_media_chunk']), (1, 3))
        self.assertGreater(commands['ping'], 2)

    def test_what_is_ready_while_the_line_is_down_is_pushed(self):
        go = threading.Event()

        def slow(msg):
            go.wait(5)
            return ['一', '二']
        server = self.server(slow)
        server.bot.slow_after = 60
        self.bot.say('zhangsan', '你好')
        self.until(lambda: server._once._runs)
        self.wecom.stop()
        self.until(lambda: not server.connected)
        go.set()
        self.until(lambda: not server._once._runs)
        self.assertEqual(len(server._left()), 1)
        self.wecom.start(port=int(self.url.rpartition(':')[2]))
        self.assertEqual(self.see(2, how='push'), ['一', '二'])
        self.until(lambda: not server._left())

    def test_a_stream_survives_a_reconnect(self):
        more = threading.Semaphore(0)

        def pieces():
            for n in range(3):
                more.acquire(timeout=5)
                yield '字%d ' % n
        server = self.server(lambda msg: Stream(pieces()))
        self.bot.say('zhangsan', '你好')
        more.release()
        self.until(lambda: self.bot.bubbles)
        self.bot.fault('abort')
        self.back(2)
        more.release(), more.release()
        self.assertEqual(self.see(1, how='push'), ['字0 字1 字2 '])
        self.until(lambda: not server._left())
        self.assertEqual(len(self.bot.bubbles), 2)

    def test_an_upload_is_resumed(self):
        server = self.server()
        self.bot.met.add('zhangsan')
        self.bot.fault('error', 846609, cmd='aibot_upload_media_chunk')
        file = self.file('big.bin', 1300000)
        server.send(file, to='zhangsan')
        self.assertEqual(self.see(1), ['big.bin'])
        commands = collections.Counter(f['frame'].get('cmd') for f in self.bot.frames)
        self.assertEqual((commands['aibot_upload_media_init'], commands['aibot_upload_media_chunk'],
                          commands['aibot_subscribe']), (1, 4, 2))

    def test_odd_servers_are_understood(self):
        self.server(lambda msg: '答 ' + msg['Content'])
        for fault, value in (('control', None), ('fragments', None), ('masked', None), ('masked_ping', None),
                             ('ping', None), ('unknown_cmd', None), ('big', 1200000), ('late_ack', 0.2)):
            with self.subTest(fault):
                self.bot.bubbles.clear()
                self.bot.fault(fault, value)
                self.bot.say('zhangsan', fault)
                self.assertIn(fault, self.see(1)[0])
                self.bot.heal()
        self.assertEqual(self.bot.connected.number, 1)
        self.assertEqual(self.bot.problems, [])

    def test_a_wrong_secret_is_one_error_and_slow_retries(self):
        self.bot.fault('refuse', 853000, times=3)
        server = self.server(start=False)
        server.start()
        self.addCleanup(server.stop)
        self.assertFalse(server.bot._session.wait(5))
        with self.assertRaises(APIError) as raised:
            server.bot.send('x', to='zhangsan')
        self.assertEqual(raised.exception.errcode, 853000)
        self.until(lambda: server.connected)
        self.assertEqual(self.log().count('ERROR'), 1)
        self.assertIn('不是应用的 Secret', self.log())

    def test_too_many_subscriptions_wait(self):
        self.bot.fault('refuse', 45009)
        server = self.server(start=False)
        begin = time.monotonic()
        server.start()
        self.addCleanup(server.stop)
        self.until(lambda: server.connected)
        self.assertGreaterEqual(time.monotonic() - begin, server.bot.slow_pause)

    def test_no_duel(self):
        """两处同一个 BotID：后来的赢，先前的等一等再来，越等越久。"""
        first = self.server(lambda msg: '一')
        second = self.server(lambda msg: '二', start=False)
        second.bot._session.start(False)
        self.addCleanup(second.stop)
        self.until(lambda: first.bot._session.stage == 'kicked')
        self.until(lambda: second.bot._session.stage == 'kicked')
        self.assertGreater(second.bot._session._pauses['kicked'], second.bot.slow_pause)
        self.assertIn('同一个 BotID 只能有一处在运行', self.log())

    def test_what_was_stopped_does_not_come_back(self):
        dialing, go = threading.Event(), threading.Event()
        connect = socket.create_connection

        def slow(*args):
            dialing.set()
            go.wait(10)
            return connect(*args)
        server = self.server(start=False)
        with swapped(socket, 'create_connection', slow):
            server.start()
            thread = server.bot._session._thread
            self.assertTrue(dialing.wait(5))
            thread.join = lambda within: None
            server.stop()
            del thread.join
            go.set()
            thread.join(5)
        self.assertFalse(thread.is_alive() or server.connected)
        self.until(lambda: not self.bot.connected)
        self.assertNotIn('aibot_subscribe', [f['frame'].get('cmd') for f in self.bot.frames][1:])
        self.assertIsNone(server.start())           # 又能用了
        self.until(lambda: server.connected)
        server.stop()

    def test_threads_that_send_at_once_share_one_connection(self):
        bot = easywechat.WeChatBot('test', **self.wecom.bot_settings)
        self.bot.met.add('zhangsan')
        threads = [threading.Thread(target=bot.send, args=(str(n), 'zhangsan')) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        self.assertEqual(sorted(self.see(8)), [str(n) for n in range(8)])
        self.assertFalse(bot._session.running() or bot._session.users)

    def test_a_suspended_machine_reconnects(self):
        server = self.server()
        before = time.time
        with swapped(time, 'time', lambda: before() + 3600):
            self.back(2)
        self.assertIn('休眠', self.log())
        server.stop()

    def test_a_chat_that_never_spoke(self):
        server = self.server()
        with self.assertRaises(APIError) as raised:
            server.send('x', to='lisi')
        self.assertIn('先跟机器人说一句话', str(raised.exception))
        for to in None, '@all', '':
            with self.assertRaises(APIError):
                server.send('x', to=to)
        self.bot.met.update(['lisi', 'zhangsan'])
        server.send('x', to=['lisi', 'zhangsan'])
        self.assertEqual(sorted(b['chat'] for b in self.bot.bubbles), ['lisi', 'zhangsan'])

    def test_pushes_are_paced(self):
        server = self.server()
        self.bot.met.add('zhangsan')
        waited = []
        server.bot._sleep = waited.append
        server.bot.per_minute = 3
        for n in range(4):
            server.send(str(n), to='zhangsan')
        self.assertEqual([round(w) for w in waited], [60])

    def test_nothing_is_held_at_rest(self):
        server = self.server(lambda msg: '好')
        for n in range(50):
            self.bot.say('zhangsan', str(n))
        self.see(50)
        self.until(lambda: not server._once._runs and not server._left())
        self.assertEqual((server.bot._session._asked, len(server._chats._talks)), ({}, 0))
        thread = server.bot._session._thread
        server.stop()
        self.assertFalse(thread.is_alive())
        self.assertRaises(NetworkError, server.bot._session.ask, 'aibot_send_msg', {})


class DoorTests(BotCase):
    """本机别的进程，经过在运行的机器人发。"""

    def setUp(self):
        super().setUp()
        self.ini = os.path.join(self.folder, 'config.ini')
        with open(os.open(self.ini, os.O_WRONLY | os.O_CREAT, 0o600), 'w', encoding='utf-8') as f:
            f.write('[demo]\ntouser = zhangsan\n')
            f.writelines('%s = %s\n' % item for item in self.wecom.bot_settings.items())
        self.bot.met.add('zhangsan')

    def command(self, *words, stdin=b''):
        env = dict(os.environ, EASYWECHAT_CONFIG=self.ini, XDG_CACHE_HOME=self.folder, PYTHONIOENCODING='utf-8')
        words = [word.encode('utf-8', 'surrogateescape') for word in words]
        found = subprocess.run([sys.executable, SOURCE] + words, input=stdin, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=env, timeout=20)
        return found.returncode, found.stdout.decode('utf-8', 'replace'), found.stderr.decode('utf-8', 'replace')

    def test_the_command_line_sends_through_the_running_bot(self):
        self.server()
        self.assertEqual(self.command('--send', '-', stdin='磁盘 91%'.encode()), (0, '', ''))
        self.assertEqual(self.command('--send-file', str(self.file('报告.pdf', 600000))), (0, '', ''))
        mail = 'Subject: 备份失败\r\nFrom: root\r\n\r\n正文'.encode()
        self.assertEqual(self.command('--mail', stdin=mail), (0, '', ''))
        self.assertEqual(self.see(3), ['磁盘 91%', '报告.pdf', '备份失败\n来自 root\n\n正文'])
        self.assertEqual(self.bot.connected.number, 1)          # 没有另外连
        code, _, err = self.command('--send', 'x', '--to', 'lisi')
        self.assertEqual((code, err.count('\n')), (1, 1))
        self.assertIn('先跟机器人说一句话', err)
        self.assertEqual(self.command('--send', 'x', '--party', '2')[0], 2)
        code, out, _ = self.command('--check')
        self.assertIn('智能机器人在运行（进程 %d），长连接通着' % os.getpid(), out)

    def test_without_a_running_bot_it_connects_by_itself(self):
        self.assertEqual(self.command('--send', '磁盘 91%'), (0, '', ''))
        self.assertEqual(self.see(1), ['磁盘 91%'])
        self.until(lambda: not self.bot.connected)
        code, out, err = self.command('--check')
        self.assertEqual((code, err), (0, ''))
        self.assertIn('bot_id 和 bot_secret 正确', out)
        self.bot.fault('refuse', 853000)
        code, _, err = self.command('--send', 'x')
        self.assertEqual(code, 1)
        self.assertIn('不是应用的 Secret', err.splitlines()[-1])
        self.wecom.stop()
        bot = easywechat.WeChatBot('test', **self.wecom.bot_settings)
        bot.offline_within = bot.pause = 0.05
        with self.assertLogs('easywechat'), self.assertRaises(NetworkError) as raised:
            bot.send('x', to='zhangsan')
        self.assertEqual((raised.exception.errcode, raised.exception.maybe_sent), (503, False))

    def test_the_six_lines_of_the_readme_without_any_package(self):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            lines = re.search('```python\n(.*?)```', f.read(), re.S).group(1)
        left_out = 'Crypto Cryptodome logging ssl _ssl unicodedata encodings.idna decimal asyncio sqlite3 uuid lzma bz2'
        program = 'import sys\nfor name in %r.split():\n    sys.modules[name] = None\n%s' % (left_out, lines)
        bot = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, EASYWECHAT_CONFIG=self.ini, PYTHONPATH=HERE,
                                        PYTHONIOENCODING='utf-8'))
        self.addCleanup(bot.kill)
        self.until(lambda: self.bot.connected)
        self.bot.say('zhangsan', '你好')
        self.assertEqual(self.see(1), ['你好'])
        bot.terminate()
        out, err = (text.decode('utf-8') for text in bot.communicate(timeout=10))
        self.assertEqual((bot.returncode, out), (0, ''))
        self.assertIn('touser = zhangsan', err)


class GuestTests(unittest.TestCase):
    """本机的套接字：一个在运行的机器人 (``self.server``)，和别的进程里的 (``self.make().bot``，`guest`)。"""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.addCleanup(os.environ.update, XDG_CACHE_HOME=os.environ.get('XDG_CACHE_HOME', ''))
        os.environ['XDG_CACHE_HOME'] = self.folder          # 端口文件
        self.wecom = simulator.WeCom()
        self.wecom.start()
        self.addCleanup(self.wecom.stop)
        self.wecom.bot.met.add('zhangsan')
        SECRETS.update([self.wecom.bot.settings['bot_secret']])

    def make(self):
        server = WeChatServer('test', **self.wecom.bot_settings)
        vars(server.bot).update(offline_within=0.2, ack_within=0.3, hand_over_within=1, pause=0.05, per_minute=1000)
        server.bot._sleep = lambda seconds: None
        server.register_callback('text', lambda msg: msg['Content'])
        return server

    def run_bot(self):
        self.server = self.make()
        self.addCleanup(self.server.stop)
        self.server.start()
        self.wecom.bot.wait(lambda bot: bot.connected)
        return self.server

    def subscribed(self):
        return sum(frame['frame'].get('cmd') == 'aibot_subscribe' for frame in self.wecom.bot.frames)

    def pushed(self):
        return [bubble['text'] for bubble in self.wecom.bot.bubbles if bubble['how'] == 'push']

    def guest(self, proof=None):
        """套接字一级的客人 →（socket, 一行一行的文件）；``proof`` 是它的证明，None 是对的。"""
        bot = self.server.bot
        sock = easywechat._dial(bot)
        self.addCleanup(sock.close)
        lines = sock.makefile('rb')
        self.addCleanup(lines.close)
        theirs = json.loads(lines.readline().decode())['nonce']
        proof = easywechat._keyed(bot, 'guest', theirs, 'mine') if proof is None else proof
        sock.sendall(json.dumps({'nonce': 'mine', 'proof': proof}).encode() + b'\n')
        return sock, lines

    def rest(self, lines):
        """→ 断开以前还说了什么；没读完我们的就断，是 RST。"""
        try:
            return lines.read()
        except ConnectionError:
            return b''

    def hand_over(self, text):
        """又一个进程发一条 → 送到了没有，经过在运行的机器人。"""
        before = self.subscribed()
        self.make().bot.send(text, 'zhangsan')
        return self.pushed()[-1] == text and self.subscribed() == before

    def test_another_process_hands_over(self):
        self.run_bot()
        self.assertTrue(self.hand_over('磁盘 91%'))
        path = pathlib.Path(self.folder, os.fsdecode('报告.bin'.encode('utf-8')))
        data = os.urandom(700000)
        path.write_bytes(data)
        self.make().bot.send([path, '看附件'], 'zhangsan')
        media = self.wecom.media[self.wecom.bot.bubbles[-2]['body']['media_id']]
        self.assertEqual((media['name'], media['data']), ('报告.bin', data))
        self.assertEqual(self.pushed()[-1], '看附件')
        self.assertEqual(self.subscribed(), 1)
        self.assertTrue(self.server.connected)

    def test_a_file_that_the_bot_may_not_read_comes_through_the_socket(self):
        self.run_bot()
        with open(os.path.join(self.folder, 'gone.bin'), 'w+b') as f:
            f.write(b'only the sender has it')
            os.remove(f.name)
            self.make().bot.send(f, 'zhangsan')
        media = self.wecom.media[self.wecom.bot.bubbles[-1]['body']['media_id']]
        self.assertEqual(media['data'], b'only the sender has it')

    def test_who_cannot_prove_the_secret_gets_nothing(self):
        self.run_bot()
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for proof in '', 'x' * 64, '磁', easywechat._keyed(self.server.bot, 'host', 'a', 'mine'):
                sock, lines = self.guest(proof)
                with contextlib.suppress(OSError):          # 也许已经断了
                    sock.sendall(b'{"send": {"chatid": "zhangsan", "msgtype": "markdown", '
                                 b'"markdown": {"content": "x"}}}\n')
                self.assertEqual(self.rest(lines), b'')
        self.assertEqual([line.count('wrong proof') for line in logs.output], [1] * 3)       # 第 1、2、4 次
        self.assertEqual(self.pushed(), [])
        self.assertTrue(self.hand_over('还在'))

    def test_who_squats_on_the_name_gets_nothing_and_stops_nobody(self):
        self.server = self.make()
        squatter = easywechat._listen(self.server.bot)
        self.addCleanup(squatter.close)
        squatter.setblocking(True)
        got = []

        def squat():
            with contextlib.suppress(OSError):
                while True:
                    with squatter.accept()[0] as sock:
                        sock.sendall(b'{"nonce": "n"}\n')
                        got.append(sock.recv(1 << 16))
                        sock.sendall(b'{"proof": "%s", "pid": 1, "stage": "ready"}\n' % (b'0' * 64))
                        got.append(sock.recv(1 << 16))
        threading.Thread(target=squat, daemon=True).start()
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.run_bot()
        self.assertIn('the local name is taken', logs.output[0])
        sender = self.make()
        sender.bot.send('自己发', 'zhangsan')
        self.assertEqual((self.pushed(), self.subscribed()), (['自己发'], 2))
        self.assertEqual(set(got[1::2]), {b''})
        self.assertEqual({tuple(sorted(json.loads(line.decode()))) for line in got[::2]}, {('nonce', 'proof')})
        self.assertNotIn(self.wecom.bot.settings['bot_secret'], str(got))

    def test_a_second_bot_on_this_machine_does_not_start(self):
        self.run_bot()
        second = self.make()
        with self.assertRaises(ConfigError) as caught:
            second.start()
        self.assertIn('进程 %d' % os.getpid(), str(caught.exception))
        self.assertFalse(second.bot._session.running())
        self.assertEqual(self.subscribed(), 1)
        self.server.stop()
        second.start()                  # 名字马上空出来
        self.addCleanup(second.stop)
        self.wecom.bot.wait(lambda bot: self.subscribed() == 2 and bot.connected)

    def test_the_ninth_guest_is_told_to_come_again(self):
        self.run_bot()
        guests = [self.guest() for _ in range(8)]
        for _, lines in guests:
            self.assertEqual(json.loads(lines.readline().decode())['pid'], os.getpid())
        with contextlib.closing(easywechat._dial(self.server.bot)) as ninth, ninth.makefile('rb') as lines:
            self.assertEqual(lines.read(), b'{"busy": true}\n')
        threading.Timer(0.1, guests[0][0].shutdown, (socket.SHUT_RDWR,)).start()
        self.assertTrue(self.hand_over('第九个'))

    def test_a_line_without_end_is_cut(self):
        self.run_bot()
        sock, lines = self.guest()
        lines.readline()
        with contextlib.suppress(OSError):
            sock.sendall(b'x' * (2 << 20))
        self.assertEqual(self.rest(lines), b'')
        self.assertTrue(self.hand_over('还在'))

    def test_nonsense_of_a_guest_harms_nobody(self):
        self.run_bot()
        for request in ('{}', '[]', 'null', '\x00', '{' * 100, '{"send": null}', '{"send": {"msgtype": "markdown"}}',
                        '{"send": {"chatid": 1}}', '{"upload": 1}', '{"upload": {"size": "x"}}',
                        '{"upload": {"size": -1, "name": "a", "kind": "file"}}',
                        '{"upload": {"size": 9, "name": "a.bin", "kind": "nosuch"}}\n123456789'):
            sock, lines = self.guest()
            lines.readline()
            sock.sendall(request.encode() + b'\n')
            sock.shutdown(socket.SHUT_WR)
            self.assertNotIn(b'ack', self.rest(lines), request)
        sock, lines = self.guest()      # 太大的，一个字节也不等
        lines.readline()
        sock.settimeout(5)
        sock.sendall(b'{"upload": {"size": 99999999999, "name": "a.bin", "kind": "file"}}\n')
        self.assertEqual(self.rest(lines), b'')
        sock, lines = self.guest()      # 传到一半走了
        lines.readline()
        sock.sendall(b'{"upload": {"size": 1000000, "name": "a.bin", "kind": "file"}}\nabc')
        sock.close(), lines.close()
        self.assertTrue(self.hand_over('还在'))
        self.assertEqual(self.pushed(), ['还在'])

    def failing(self, *args):
        with self.assertRaises(APIError) as caught:
            self.make().bot.send(*args)
        return caught.exception

    def test_an_error_is_the_same_as_without_the_way_round(self):
        self.run_bot()
        errors = [self.failing('x', 'nobody')]
        with self.assertRaises(APIError) as caught:
            self.server.bot.send('x', 'nobody')
        errors.append(caught.exception)
        self.assertEqual(*[(type(e), e.errcode, e.errmsg, e.path, e.hint) for e in errors])
        self.assertEqual(errors[0].errcode, 93006)

    def test_while_the_line_is_down_nothing_is_sent(self):
        self.run_bot()
        self.wecom.bot.fault('handshake', 503, times=10 ** 6)
        self.wecom.bot.fault('close', 1000)
        self.wecom.bot.wait(lambda bot: not bot.connected)
        error = self.failing('x', 'zhangsan')
        self.assertEqual((type(error), error.errcode, error.maybe_sent), (NetworkError, 503, False))
        self.assertIn('没有发', str(error))
        self.wecom.bot.heal()
        self.wecom.bot.wait(lambda bot: bot.connected)
        self.assertEqual(self.pushed(), [])

    def test_without_an_acknowledgement_it_may_have_been_delivered(self):
        self.run_bot()
        self.wecom.bot.fault('no_ack', cmd='aibot_send_msg')
        error = self.failing('x', 'zhangsan')
        self.assertEqual((type(error), error.errcode, error.maybe_sent), (NetworkError, 504, True))
        self.assertIn('可能已经到了', str(error))
        self.assertEqual(self.pushed(), ['x'])

    def test_a_sender_is_told_that_the_bot_waits(self):
        self.run_bot().bot.per_minute = 1
        self.make().bot.send('一', 'zhangsan')
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.make().bot.send('二', 'zhangsan')
        self.assertIn('the running bot waits', '\n'.join(logs.output))
        self.assertEqual(self.pushed(), ['一', '二'])

    def test_several_threads_send_at_once(self):
        errors = []

        def send(bot, n):
            try:
                bot.send('第 %d 条' % n, 'zhangsan')
            except APIError as e:
                errors.append(e)

        for running in False, True:
            del self.wecom.bot.bubbles[:]
            bot = self.run_bot().bot if running else self.make().bot    # 没有在运行的：自己连一下
            bot.offline_within = 5
            threads = [threading.Thread(target=send, args=(bot, n)) for n in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            self.assertEqual((errors, len(set(self.pushed()))), ([], 5))

    def test_where_there_are_no_abstract_names_a_file_says_the_port(self):
        self.addCleanup(setattr, easywechat, '_ABSTRACT', easywechat._ABSTRACT)
        easywechat._ABSTRACT = False
        bot = self.make().bot
        path = easywechat._port_file(bot)
        with socket.socket() as other:      # 以前的，别人在用那个端口
            other.bind(('127.0.0.1', 0))
            for text in '', 'xyz', '99999', '%5d' % other.getsockname()[1]:
                with open(path, 'w') as f:
                    f.write(text)
                self.assertIsNone(easywechat._meet(bot), text)
        self.run_bot()
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertTrue(self.hand_over('经过端口'))
        with self.assertRaises(ConfigError):
            self.make().start()
        self.server.stop()
        self.make().bot.send('没有人在', 'zhangsan')
        self.assertEqual((self.pushed()[-1], self.subscribed()), ('没有人在', 2))
        self.assertNotIn(self.wecom.bot.settings['bot_secret'], ''.join(os.listdir(os.path.dirname(path))))


class BotFaultTests(unittest.TestCase):
    """一帧错了、文件没有了、线死了：不停地试是不行的。"""

    def setUp(self):
        self.wecom = simulator.WeCom()
        self.wecom.start()
        self.addCleanup(self.wecom.stop)
        self.bot = self.wecom.bot
        self.server = WeChatServer('test', **self.wecom.bot_settings)
        vars(self.server.bot).update(ack_within=0.1, pause=0.05, frame_every=0.05)
        self.addCleanup(self.server.stop)

    def start(self, answer):
        self.server.register_callback('*', answer)
        self.server.start()
        self.bot.wait(lambda bot: bot.connected)

    def settled(self):
        """→ 机器人发来过几帧回复；都送完了。"""
        end = time.monotonic() + 5
        while self.server._chats.left() and time.monotonic() < end:
            time.sleep(0.01)
        self.assertEqual(self.server._chats.left(), [])
        return sum(f['frame'].get('cmd') in ('aibot_respond_msg', 'aibot_send_msg') for f in self.bot.frames)

    def test_a_refused_final_frame_is_not_sent_for_ever(self):
        self.start(lambda msg: '答')
        self.bot.fault('error', 40058, times=10 ** 6, cmd='aibot_respond_msg')
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.bot.say('zhangsan', '问')
            self.bot.wait(lambda bot: any(f['sender'] == 'bot' and f['frame']['cmd'] == 'aibot_respond_msg'
                                          for f in bot.frames))
            self.assertLess(self.settled(), 3)
        self.assertEqual(len(logs.output), 1)

    def test_a_bubble_that_cannot_be_closed_is_given_up(self):
        go = threading.Event()
        self.server.bot.slow_after, self.server.answer_within = 0.05, 0.3
        self.start(lambda msg: go.wait(5) and '答')
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.bot.say('zhangsan', '问')
            self.bot.wait(lambda bot: bot.bubbles)
            self.bot.fault('error', 40058, times=10 ** 6, cmd='aibot_respond_msg')
            go.set()
            self.bot.wait(lambda bot: len(logs.output) > 1)
            self.assertEqual(self.settled(), 3)
        self.assertEqual(len(logs.output), 2)

    def test_an_answer_without_acknowledgement_is_followed_by_nothing(self):
        self.start(lambda msg: '答')
        for times in 1, 10 ** 6:
            self.bot.fault('no_ack', times=times, cmd='aibot_respond_msg')
            before = len(self.bot.bubbles)
            with self.assertLogs('easywechat', 'ERROR') as logs:
                self.bot.say('zhangsan', '问')
                self.bot.wait(lambda bot, before=before: len(bot.bubbles) > before)
                self.settled()
            self.assertIn('可能已经到了', logs.output[0])
            self.assertEqual([b['text'] for b in self.bot.bubbles[before:]], ['答'])

    def test_a_file_that_cannot_be_fetched_is_tried_once(self):
        self.start(lambda msg: msg)
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.bot._deliver('message', {'msgtype': 'image', 'image': {
                'url': 'http://127.0.0.1:1/x', 'aeskey': 'a' * 43}}, 'zhangsan', 'zhangsan', [])
            end = time.monotonic() + 5
            while not logs.output and time.monotonic() < end:
                time.sleep(0.01)
            self.settled()
        self.assertEqual(len(logs.output), 1)

    def test_a_strange_cmd_is_ignored(self):
        self.start(lambda msg: '答')
        for cmd in {'a': 1}, [[]], 7, True:
            self.bot._send(self.bot.connected, {'cmd': cmd, 'headers': {'req_id': 'r'}, 'body': {}})
        self.bot.say('zhangsan', '问')
        self.bot.wait(lambda bot: [b['text'] for b in bot.bubbles] == ['答'])
        self.assertEqual(sum(f['frame'].get('cmd') == 'aibot_subscribe' for f in self.bot.frames), 1)

    def test_stopping_on_a_dead_line_takes_no_second_for_each_bubble(self):
        going = threading.Event()
        self.addCleanup(going.set)

        def pieces():
            yield '一'
            going.wait(10)
            yield '二'
        self.server.stop_within = 0.2
        self.start(lambda msg: Stream(pieces()))
        for user in 'zhangsan', 'lisi', 'wangwu':
            self.bot.say(user, '流')
        self.bot.wait(lambda bot: len(bot.bubbles) == 3)
        self.bot.fault('half_open')
        begin = time.monotonic()
        self.server.stop()
        self.assertLess(time.monotonic() - begin, 2.7)


class HastyBot(WeChatServer):
    """JSON 回调的智能机器人，时限缩成三十分之一。"""
    answer_within, hold_within, lease, stop_within = 0.15, 0.2, 0.3, 0.5


class JsonBotTests(unittest.TestCase):
    """智能机器人的 JSON 回调 (path/101039)：这里的企业微信是真的套接字、自己的几行。"""

    BOT = 'aibPlantedBot01'
    PNG, JPG = b'\x89PNG\r\n\x1a\n' + bytes(range(256)), b'\xff\xd8\xff\xe0' + bytes(range(200))
    CARD = {'card_type': 'text_notice', 'main_title': {'title': '告警'}, 'card_action': {'type': 1, 'url': 'https://e.x'}}

    def setUp(self):
        self.crypt = WXBizMsgCrypt(SETTINGS['token'], SETTINGS['encoding_aes_key'], '')
        self.go, self.runs, self.gives, self.posted = threading.Event(), [], {}, []
        SECRETS.add('plantedC0de')
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder, True)

    def callback(self, msg):
        """gives 里有的照它给（函数就叫它）；第二个字段是「慢」的，等到 go。"""
        what, _, slow = msg.get('Content', msg.get('Event', '')).partition(' ')
        self.runs.append(what)
        if slow:
            self.go.wait(10)
        give = self.gives.get(what, what)
        return give(msg) if callable(give) else give

    def server(self, cls=HastyBot, store=None, corpid='', **settings):
        settings = dict(SETTINGS, corpid=corpid, secret='', bot_id=self.BOT, **settings)
        server = cls('test', store=store, **settings)
        server.bot.frame_every = 0.01
        server.register_callback('*', self.callback)
        server.address = server.start('127.0.0.1', 0)
        self.addCleanup(server.stop)
        self.addCleanup(self.go.set)            # 先
        return server

    def message(self, content='你好', user='li.lei', **fields):
        msg = {'msgid': 'M%d' % next(IDS), 'aibotid': self.BOT, 'chattype': 'single', 'from': {'userid': user},
               'msgtype': 'text', 'text': {'content': content}}
        msg.update(fields)
        return {k: v for k, v in msg.items() if v is not None}

    def event(self, kind, data=None, **fields):
        event = dict({'eventtype': kind}, **{kind: data} if data else {})
        return self.message(msgtype='event', text=None, event=event, create_time=int(time.time()), **fields)

    def picture(self, name, data):
        path = pathlib.Path(self.folder, name)
        with open(str(path), 'wb') as f:
            f.write(data)
        return path

    def request(self, msg, crypt=None):
        text = msg if isinstance(msg, str) else json.dumps(msg, ensure_ascii=False)
        encrypt, now, nonce = (crypt or self.crypt).seal(text), str(int(time.time())), str(random.getrandbits(31))
        query = {'msg_signature': self.crypt.sign(now, nonce, encrypt), 'timestamp': now, 'nonce': nonce}
        return 'POST', '/weixin?' + urllib.parse.urlencode(query), json.dumps({'encrypt': encrypt.decode()}).encode()

    def opened(self, body, target):
        """回答的信封 → 里面的 dict；空的是 None。"""
        if not body:
            return None
        envelope, query = json.loads(body.decode()), dict(urllib.parse.parse_qsl(target.partition('?')[2]))
        self.assertEqual((envelope['nonce'], envelope['timestamp']), (query['nonce'], int(query['timestamp'])))
        return json.loads(self.crypt.decrypt_message(
            json.dumps({'encrypt': envelope['encrypt']}), envelope['msgsignature'], query['timestamp'], query['nonce']))

    def post(self, server, msg, crypt=None):
        """投递一次 → 答复 (dict)；拒绝了的是状态 (int)。"""
        method, target, body = self.request(msg, crypt)
        begin = time.monotonic()
        status, fields, answer = ask_socket(server.address, method, target, body)
        self.assertLess(time.monotonic() - begin, 20 * server.answer_within)     # 忙的机器上也不是回调的几秒
        return self.opened(answer, target) if status == 200 else status

    def fast(self, server, msg):
        """同 `post`；不管机器多忙，回调都算快的。"""
        server.answer_within = WeChatServer.answer_within
        try:
            return self.post(server, msg)
        finally:
            del server.answer_within

    def poll(self, server, stream_id, **fields):
        msg = self.message(msgtype='stream', text=None, stream={'id': stream_id}, **fields)
        stream = self.post(server, msg)['stream']
        self.assertEqual(stream['id'], stream_id)
        return stream

    def until(self, server, stream_id, condition=lambda stream: stream['finish']):
        """问到 ``condition(stream)`` 为止 → 那时的 stream。"""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            stream = self.poll(server, stream_id)
            if condition(stream):
                return stream
            time.sleep(0.01)
        raise AssertionError(stream)

    def wait_for(self, condition):
        deadline = time.monotonic() + 5
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        return condition()

    def at_once(self, jobs):
        """每个 job 一条线程 → 它们的结果，依次。"""
        results = [None] * len(jobs)

        def run(n):
            results[n] = jobs[n]()
        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return results

    def response_url(self, answer=b'{"errcode":0,"errmsg":"ok"}', status=200):
        """→ 一个 response_url；发到那里的在 posted。"""
        def take(handler):
            self.posted.append(json.loads(handler.rfile.read(int(handler.headers['Content-Length'])).decode()))
            handler.send_response(status)
            handler.end_headers()
            handler.wfile.write(answer)
        return stand_in(self, take) + '/cgi-bin/aibot/response?response_code=plantedC0de'

    def texts(self, count=1):
        self.wait_for(lambda: len(self.posted) >= count)
        time.sleep(0.05)                # 多出来的也等一等
        return [m.get('markdown', {}).get('content', m['msgtype']) for m in self.posted]

    def everything(self):
        """回调给的每一种 → 气泡里的字和几张图片；字是 None 的，快的什么也没有，慢的是「没有回复」。"""
        async def coroutine(text='async'):
            return text

        async def several():
            yield '一'
            yield coroutine('二')

        async def pieces():
            for piece in '流', '水':
                yield piece

        def generator(msg):
            yield '一'
            yield None
            yield '二'

        def broken(pieces=('半句',)):
            yield from pieces
            raise ValueError('x')
        png, jpg = self.picture('a.png', self.PNG), self.picture('b.jpg', self.JPG)
        other, fake = self.picture('c.txt', b'x' * 99), self.picture('d.png', b'x' * 99)
        big = {'MsgType': 'image', 'MediaId': self.picture('e.png', self.PNG + bytes(10 << 20))}
        bad = {'msgtype': 'template_card', 'template_card': {'card_type': png}}
        article = {'title': '标题', 'description': '<b>话</b>', 'url': 'https://e.x/'}
        return {
            'str': ('好', '好', 0), 'none': (None, None, 0), 'list': (['一', ['二'], None], '一\n\n二', 0),
            'tuple': (('一', '二'), '一\n\n二', 0), 'empty': ([], None, 0), 'generator': (generator, '一\n\n二', 0),
            'async': (lambda msg: coroutine(), 'async', 0), 'agen': (lambda msg: several(), '一\n\n二', 0),
            'stream': (lambda msg: Stream(iter('流水')), '流水', 0),
            'astream': (lambda msg: Stream(pieces()), '流水', 0),
            'both': (lambda msg: ['头', Stream('流水')], '头\n\n流水', 0),
            'halfstream': (lambda msg: Stream(broken()), '半句\n\n\uff08出错了\uff09', 0),
            'nostream': (lambda msg: Stream(broken(())), '出错了', 0), 'half': (lambda msg: broken(), '半句', 0),
            'raise': (lambda msg: [][1], '出错了', 0), 'exit': (lambda msg: sys.exit(3), '出错了', 0),
            'blank': (' \n', '出错了', 0), 'object': (object(), '出错了', 0), 'wrong': ([object(), '好'], '好', 0),
            'png': (png, '\uff08图片\uff09', 1), 'pictures': (['看', png, jpg], '看', 2),
            'many': ([jpg] * 12, '\uff08图片\uff09', 10), 'file': (other, None, 0), 'fake': ([fake, '好'], '好', 0),
            'big': ([big, '好'], '好', 0), 'badcard': (bad, '出错了', 0),
            'app': ({'Content': '好'}, '好', 0),
            'appimage': ({'MsgType': 'image', 'MediaId': png}, '\uff08图片\uff09', 1),
            'news': ({'MsgType': 'news', 'Articles': [article]}, '[标题](https://e.x/)\n话', 0),
            'markdown': ({'msgtype': 'markdown', 'markdown': {'content': '**好**'}}, '**好**', 0),
            'official': ({'msgtype': 'stream', 'stream': {'id': 'x', 'finish': True, 'content': '好'}}, '好', 0),
            'echo': (lambda msg: msg, None, 0)}

    def check(self, name, frame, text, images, slow):
        if text is None:
            text = '\uff08没有回复\uff09' if slow else {}
        if text == '出错了' and not slow:       # 没有开着的气泡：写日志
            text = {}
        if name == 'echo':
            text = 'echo' + ' slow' * slow
        if text == {}:
            return self.assertEqual(frame, {})
        stream = frame['stream']
        self.assertEqual((stream['finish'], stream['content']), (True, text))
        items = stream.get('msg_item', [])
        self.assertEqual(len(items), images)
        for item in items:
            data = binascii.a2b_base64(item['image']['base64'])
            self.assertIn(data, (self.PNG, self.JPG))
            self.assertEqual((item['msgtype'], item['image']['md5']), ('image', hashlib.md5(data).hexdigest()))

    def test_whatever_a_callback_gives_it_is_answered_in_time(self):
        server, cases = self.server(), self.everything()
        self.gives = {name: give for name, (give, _, _) in cases.items()}
        with self.assertLogs('easywechat', 'WARNING') as logs:
            for name, (_, text, images) in cases.items():
                with self.subTest(fast=name):
                    self.check(name, self.fast(server, self.message(name)), text, images, False)
        self.assertEqual(len([line for line in logs.output if 'not sent to' in line]), 5, logs.output)
        names = list(cases)
        first = self.at_once([functools.partial(self.post, server, self.message(name + ' slow', name))
                              for name in names])
        for name, frame in zip(names, first):
            with self.subTest(first=name):
                self.assertEqual((frame['msgtype'], frame['stream']['finish'], frame['stream']['content']),
                                 ('stream', False, '<think></think>'))
                self.assertNotIn('msg_item', frame['stream'])
                self.assertEqual(self.poll(server, frame['stream']['id'])['finish'], False)
        self.assertEqual(len({frame['stream']['id'] for frame in first}), len(names))
        self.go.set()
        for name, frame in zip(names, first):
            with self.subTest(slow=name):
                last = {'stream': self.until(server, frame['stream']['id'])}
                self.check(name, last, *cases[name][1:] + (True,))
        self.assertEqual(collections.Counter(self.runs), dict.fromkeys(names, 2))
        self.wait_for(lambda: not server._left())
        self.assertEqual(server._left(), [])

    def test_a_placeholder_of_ones_own_and_an_error_with_debug(self):
        server = self.server(bot_placeholder='稍等')
        server.debug, self.gives['bad'] = True, lambda msg: [][1]
        frame = self.post(server, self.message('bad slow'))
        self.assertEqual(frame['stream']['content'], '稍等')
        self.go.set()
        line = 'IndexError: list index out of range'
        self.assertEqual(self.until(server, frame['stream']['id'])['content'], line)
        self.assertEqual(self.fast(server, self.message('bad'))['stream']['content'], line)

    def test_a_stream_is_read_as_it_is_written(self):
        server, gates = self.server(), [threading.Event() for _ in range(3)]

        def pieces():
            for n, gate in enumerate(gates):
                gate.wait(5)
                yield '第%d段 ' % n
        self.gives['s'] = lambda msg: Stream(pieces())
        stream_id = self.post(server, self.message('s'))['stream']['id']
        for n, gate in enumerate(gates[:2]):
            gate.set()
            self.until(server, stream_id, lambda stream, n=n: ('第%d段' % n in stream['content'], stream['finish']) == (
                True, False))
        gates[2].set()
        self.assertEqual(self.until(server, stream_id)['content'], '第0段 第1段 第2段 ')

    def test_what_is_echoed_comes_back_as_it_can(self):
        AES = easywechat._aes()
        key = binascii.a2b_base64(SETTINGS['encoding_aes_key'] + '=')
        padding = 32 - len(self.PNG) % 32
        data = AES.new(key, AES.MODE_CBC, key[:16]).encrypt(self.PNG + bytes([padding]) * padding)

        def file(handler):
            handler.send_response(200)
            handler.send_header('Content-Disposition', 'attachment; filename="p.png"')
            handler.end_headers()
            handler.wfile.write(data)
        server, url = self.server(), stand_in(self, file) + '/f?sign=1'
        server.register_callback('*', lambda msg: msg)
        image, voice = {'image': {'url': url}}, {'voice': {'content': '听写'}}
        items = [{'msgtype': 'text', 'text': {'content': '看'}}, dict(image, msgtype='image')]
        for kind, body, text, count in (('image', image, '\uff08图片\uff09', 1), ('voice', voice, '听写', 0),
                                        ('mixed', {'mixed': {'msg_item': items}}, '看', 1),
                                        ('mixed', {'mixed': {'msg_item': items[1:]}}, '\uff08图片\uff09', 1)):
            with self.subTest(kind=kind):
                stream = self.fast(server, self.message(text=None, msgtype=kind, **body))['stream']
                self.assertEqual((stream['content'], stream['finish']), (text, True))
                self.assertEqual([binascii.a2b_base64(item['image']['base64']) for item in stream.get('msg_item', [])],
                                 [self.PNG] * count)

    def test_a_message_delivered_again_gets_the_same_stream(self):
        server, msg = self.server(), self.message('慢 慢')
        ids = {frame['stream']['id'] for frame in self.at_once([lambda: self.post(server, msg)] * 2)}
        ids.add(self.post(server, msg)['stream']['id'])          # 答过以后又来
        self.assertEqual(len(ids), 1)
        self.go.set()
        self.assertEqual(self.until(server, *ids)['content'], '慢')
        self.assertIn(self.post(server, msg)['stream']['id'], ids)
        fast = self.message('快')
        answers = [self.fast(server, fast) for _ in range(3)]
        self.assertEqual(answers, [answers[0]] * 3)
        self.assertEqual(self.runs, ['慢', '快'])
        self.fast(server, dict(fast, msgid='other'))
        self.assertEqual(self.runs, ['慢', '快', '快'])

    def test_another_worker_knows_the_bubble(self):
        redis, gate = Redis(), threading.Event()
        one, two = self.server(store=redis), self.server(store=redis)
        gates, one.answer_within, two.hold_within, one.lease = [gate, threading.Event()], 0.25, 1, 3
        one.hold_within = 1

        def pieces():
            yield '前半'
            for gate, piece in zip(gates, ('中间', '后半')):
                gate.wait(5)
                yield piece
        self.gives['s'] = lambda msg: Stream(pieces())
        msg = self.message('s')
        stream_id = self.post(one, msg)['stream']['id']
        self.assertIn(b'"finish": false', redis.store.get('easywechat:stream:' + stream_id) or b'')     # 先存，再答
        self.assertEqual(self.post(two, msg)['stream']['id'], stream_id)        # 再投递，到了别的进程
        self.assertEqual(self.until(two, stream_id, lambda s: s['content'] == '前半')['finish'], False)
        gate.set()
        self.until(two, stream_id, lambda s: s['content'] == '前半中间')
        gates[1].set()
        self.assertEqual(self.until(two, stream_id)['content'], '前半中间后半')
        self.assertEqual(self.until(one, stream_id)['content'], '前半中间后半')
        self.assertEqual(self.post(two, msg)['stream']['id'], stream_id)
        self.assertEqual(self.runs, ['s'])
        both = self.message('b 慢')             # 一起到两个进程
        frames = self.at_once([functools.partial(self.post, server, both) for server in (one, two)])
        self.assertEqual(frames[0], frames[1])
        self.assertEqual(self.poll(two, frames[0]['stream']['id'])['finish'], False)
        self.go.set()
        self.assertEqual(self.until(two, frames[0]['stream']['id'])['content'], 'b')
        self.assertEqual(self.runs, ['s', 'b'])
        redis.store._clock = lambda: time.monotonic() + 500                     # 写完了的，留着
        self.assertEqual(self.poll(two, frames[0]['stream']['id'])['content'], 'b')

    def test_the_bubble_of_a_process_that_died_does_not_turn_for_ever(self):
        redis = Redis()
        one, two = self.server(store=redis), self.server(store=redis)
        one.lease = 0.02
        stream_id = self.post(one, self.message('x 慢'))['stream']['id']
        redis.store.delete('easywechat:stream:' + stream_id)
        self.until(two, stream_id, lambda stream: not stream['finish'])         # 活着的一直续
        redis.broken = True                     # 它再也写不了
        one.store.get('x')
        redis.broken = False
        redis.store._clock = lambda: time.monotonic() + 20 * one.lease + 1
        last = self.poll(two, stream_id)
        self.assertEqual((last['finish'], last['content']), (True, '\uff08没有回复\uff09'))
        self.assertEqual(self.poll(one, stream_id)['finish'], False)
        self.go.set()

    @unittest.skipUnless(os.name == 'posix', 'FileStore 的锁是 POSIX 的')
    def test_workers_with_a_file_store(self):
        program = ("import os, sys, json, time, easywechat\n"
                   "class Bot(easywechat.WeChatServer):\n"
                   "    answer_within, hold_within, lease = 0.3, 0.4, 0.3\n"
                   "folder, settings = sys.argv[1:]\n"
                   "def callback(msg):\n"
                   "    with open(folder + '.runs', 'a') as f:\n"
                   "        f.write('x')\n"
                   "    while not os.path.exists(folder + '.go'):\n"
                   "        time.sleep(0.01)\n"
                   "    return 'ok'\n"
                   "server = Bot('t', store=easywechat.FileStore(folder), **json.loads(settings))\n"
                   "server.register_callback('text', callback)\n"
                   "print(server.start('127.0.0.1', 0)[1], flush=True)\n"
                   "sys.stdin.read()\n")
        shared, workers = os.path.join(self.folder, 'store'), []
        settings = dict(SETTINGS, corpid='', secret='', bot_id=self.BOT)
        env = dict({k: v for k, v in os.environ.items() if k[:11] != 'EASYWECHAT_'}, PYTHONIOENCODING='utf-8')
        for _ in range(2):
            process = subprocess.Popen([sys.executable, '-c', program, shared, json.dumps(settings)], cwd=HERE, env=env,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for undo in process.stdout.close, process.stdin.close, process.wait, process.kill:
                self.addCleanup(undo)
            workers.append(process)
        for worker in workers:
            worker.address, worker.answer_within = ('127.0.0.1', int(worker.stdout.readline())), 0.3
        msg = self.message()
        frames = self.at_once([functools.partial(self.post, worker, msg) for worker in workers * 2])
        stream_id = frames[0]['stream']['id']
        self.assertEqual(frames, frames[:1] * 4)
        self.assertEqual([self.poll(worker, stream_id)['finish'] for worker in workers], [False, False])
        with open(shared + '.go', 'w'):
            pass
        self.assertEqual([self.until(worker, stream_id)['content'] for worker in workers], ['ok', 'ok'])
        with open(shared + '.runs') as f:
            self.assertEqual(f.read(), 'x')

    def test_a_store_that_hangs_or_fails_delays_nothing(self):
        for how in 'stalled', 'broken':
            with self.subTest(how=how):
                redis = Redis()
                self.addCleanup(redis.go_on.set)
                redis.stalled, redis.broken = how == 'stalled' and (lambda method, **kwargs: True), how == 'broken'
                server = self.server(store=redis)
                server.store_within = 0.1
                self.go.clear()
                self.assertEqual(self.fast(server, self.message('快'))['stream']['content'], '快')
                frame = self.post(server, self.message('x 慢'))['stream']
                self.assertEqual((frame['finish'], self.poll(server, frame['id'])['finish']), (False, False))
                self.go.set()
                self.assertEqual(self.until(server, frame['id'])['content'], 'x')
                redis.go_on.set()

    def test_a_store_that_hangs_just_then_does_not_hold_up_the_first_answer(self):
        redis = Redis()
        self.addCleanup(redis.go_on.set)
        server = self.server(store=redis)
        server.store_within, server.lease = 10, 0.01
        redis.stalled = lambda method, ex=None, nx=False: method == 'set' and not nx
        frame = self.post(server, self.message('x 慢'))['stream']       # 存不下，也答
        self.assertFalse(frame['finish'] or self.poll(server, frame['id'])['finish'])
        time.sleep(0.2)                 # 不一次又一次：卡住的不会走，正要走的等一等
        self.assertTrue(self.wait_for(lambda: server._once._errands._busy < 4))
        redis.go_on.set()
        self.go.set()
        self.assertEqual(self.until(server, frame['id'])['content'], 'x')

    def test_a_long_answer_being_finished_holds_up_nobody(self):
        server, answers = self.server(), []
        server.hold_within = 2
        thread = threading.Thread(target=lambda: answers.append(self.post(server, self.message('a 慢', 'a'))))
        thread.start()
        self.assertTrue(self.wait_for(server._polls.left))
        with server._polls.left()[0].lock:
            self.assertFalse(self.post(server, self.message('b 慢', 'b'))['stream']['finish'])
            self.assertEqual(answers, [])
        thread.join(5)
        self.assertFalse(answers[0]['stream']['finish'])

    def test_who_asks_for_what_nobody_knows_is_told_so(self):
        server = self.server()
        for stream in {'id': 'nosuch'}, {'id': 'x' * 9999}, {'id': ''}, {}, None, 'x', {'id': 7}, {'id': ['a']}:
            with self.subTest(stream=str(stream)[:50]):
                last = self.post(server, self.message(msgtype='stream', text=None, stream=stream))['stream']
                self.assertEqual((last['finish'], last['content']), (True, '\uff08没有回复\uff09'))
        self.assertEqual(self.runs, [])

    def test_after_a_while_a_bubble_is_closed_and_the_rest_follows(self):
        server, gate, grown = self.server(), threading.Event(), threading.Event()
        server.bot.bubble_within, server.stop_within = 0.3, 0.1

        def pieces(rest):
            yield '前半'
            gate.wait(5)
            yield rest
            grown.set()
            self.go.wait(5)
            yield rest
        self.gives.update(s=lambda msg: Stream(pieces('后半')), e=lambda msg: Stream(pieces('')), n=None)
        urls = {what: self.response_url() for what in ('s', 'e', 'n 慢', 'w 慢')}
        urls['u 慢'] = None
        frames = self.at_once([functools.partial(self.post, server, self.message(what, what, response_url=url))
                               for what, url in urls.items()])
        ids = {what: frame['stream']['id'] for what, frame in zip(urls, frames)}
        later = '\uff08还没有好\uff0c好了再发\uff09'
        self.assertEqual([self.until(server, stream_id)['content'] for stream_id in ids.values()],
                         ['前半…', '前半…', later, later, '\uff08没有回复\uff09'])
        gate.set()
        grown.wait(5)
        self.assertEqual(self.until(server, ids['s'])['content'], '前半…')
        with self.assertLogs('easywechat', 'WARNING'):
            server.stop()                       # 写完了的不变
        with self.assertLogs('easywechat', 'ERROR') as logs:        # 没有 response_url 的
            self.go.set()
            self.assertEqual(sorted(self.texts(3)), sorted(['后半后半', '\uff08没有回复\uff09', 'w']))
            self.assertTrue(self.wait_for(lambda: not server._left()))
        self.assertEqual(len(logs.output), 1)
        self.assertEqual({m['msgtype'] for m in self.posted}, {'markdown'})

    def test_a_bubble_and_a_response_hold_20480_bytes_each(self):
        server, url, waited = self.server(), self.response_url(), []
        server.bot._sleep = waited.append
        first, second, third = ('%s%s' % (letter, '字' * 6800) for letter in 'abc')
        self.gives['long'] = '\n\n'.join([first, second])
        stream = self.fast(server, self.message('long', response_url=url))['stream']
        self.assertEqual((stream['content'], stream['finish'], self.texts(), waited), (first, True, [second], [0.01]))
        self.gives['code'] = lambda msg: Stream(['```python\n', ('x = 1 # ' + '字' * 30 + '\n') * 300, '```\n尾'])
        content = self.fast(server, self.message('code', response_url=url))['stream']['content']
        parts = [content, self.texts(2)[1]]
        self.assertEqual([(part[:10], part.count('```')) for part in parts], [('```python\n', 2)] * 2)
        self.posted.pop()
        self.gives['longer'] = lambda msg: Stream(iter([first, '\n\n', second, '\n\n', third]))
        with self.assertLogs('easywechat', 'WARNING') as logs:
            stream = self.post(server, self.message('longer 慢', response_url=url))['stream']
            self.go.set()
            self.assertEqual(self.until(server, stream['id'])['content'], first)
            self.assertEqual(self.texts(2), [second] * 2)
            self.wait_for(lambda: not server._left())
        self.assertEqual([line.split(':')[2] for line in logs.output], ['not sent to li.lei'], logs.output)
        self.go.clear()                         # 关的时候正好是满的，再加上 …
        server.bot.bubble_within, self.gives['full'] = 0.2, lambda msg: Stream(full())

        def full():
            yield 'x' * 20479
            self.go.wait(5)
        stream = self.post(server, self.message('full', response_url=url))['stream']
        last = self.until(server, stream['id'])['content']
        self.assertEqual((len(last.encode()), last[-1]), (20480, '…'))
        self.go.set()
        self.assertEqual(self.texts(3)[2], 'xx')

    def test_an_endless_text_is_held_to_what_can_be_delivered(self):
        server = self.server()

        def pieces():
            for _ in range(3000):
                yield 'x' * 1000
        self.gives['s'] = lambda msg: Stream(pieces())
        with self.assertLogs('easywechat', 'WARNING'):
            self.assertEqual(self.fast(server, self.message('s'))['stream']['content'], 'x' * 20480)
            self.wait_for(lambda: not server._left())

    def test_a_response_url_is_a_secret_and_used_once(self):
        server = self.server()
        self.gives['long'] = 'x' * 20480 + 'y'
        refused = b'{"errcode":60140,"errmsg":"invalid response_code plantedC0de"}'
        for url, words in ((self.response_url(refused), '60140'), (self.response_url(b'{}', 500), ''),
                           (self.response_url(b'<html>plantedC0de'), ''),
                           ('http://192.0.2.1/?response_code=plantedC0de', '不是 https'), (None, 'response_url'),
                           ('ftp://127.0.0.1/?response_code=plantedC0de', ''), ('plantedC0de', ''),
                           ('https://[/?response_code=plantedC0de', ''), ({'a': 'plantedC0de'}, ''),
                           ('http://127.0.0.1:1/?response_code=plantedC0de', '127.0.0.1:1')):
            with self.subTest(url=url), self.assertLogs('easywechat', 'INFO') as logs:
                stream = self.fast(server, self.message('long', response_url=url))['stream']
                self.assertEqual(len(stream['content']), 20480)
                self.assertTrue(self.wait_for(lambda: not server._left()))
                errors = [line for line in logs.output if line.startswith('ERROR')]
                self.assertEqual(len(errors), 1, logs.output)
                self.assertIn(words, errors[0])
                self.assertNotIn('plantedC0de', ''.join(logs.output))
        self.assertEqual(self.texts(3), ['y'] * 3)      # 每条一次
        self.assertNotIn('plantedC0de', str(easywechat._secrets))

    def test_what_is_no_message_of_this_bot_runs_nothing(self):
        server, poll = self.server(), self.message(msgtype='stream', text=None, stream={'id': 's'})
        other = WXBizMsgCrypt(SETTINGS['token'], SETTINGS['encoding_aes_key'], SETTINGS['corpid'])
        refused = [(self.message(**{name: None}), None) for name in ('msgid', 'aibotid', 'from')]
        refused += [({k: v for k, v in poll.items() if k != name}, None) for name in ('msgid', 'aibotid', 'from')]
        refused += [(self.message(aibotid='aibOther'), None), (dict(poll, aibotid='aibOther'), None), ('{}', None),
                    (message(), None), (message(ToUserName=self.BOT), None), ('[]', None), ('{', None),
                    (self.message(), other), (message(), other),
                    (self.message(create_time=int(time.time()) - 700), None)]
        for msg, crypt in refused:
            with self.subTest(msg=str(msg)[:200]):
                self.assertEqual(self.post(server, msg, crypt), 403)
        method, target, body = self.request(self.message('答'))         # 我们自己的答复，原样发回来
        answer = ask_socket(server.address, method, target, body)[2]
        envelope = json.loads(answer.decode())
        back = urllib.parse.urlencode({'msg_signature': envelope['msgsignature'], 'timestamp': envelope['timestamp'],
                                       'nonce': envelope['nonce']})
        self.assertEqual(ask_socket(server.address, 'POST', '/weixin?' + back, answer)[::2], (403, b''))
        self.assertEqual(ask_socket(server.address, method, target, body)[0], 200)      # 重放的
        self.assertEqual(self.runs, ['答'])

    def test_an_app_and_a_bot_share_a_port_and_their_callbacks(self):
        server = self.server(corpid=SETTINGS['corpid'])
        self.assertEqual(server.wxcpt._receive_id, SETTINGS['corpid'].encode())
        reply = opened(ask_socket(server.address, *delivery(message(Content='应用')))[2])
        self.assertEqual(reply['Content'], '应用')
        self.assertEqual(self.fast(server, self.message('机器人'))['stream']['content'], '机器人')
        event = {'MsgType': 'event', 'Event': 'x', 'FromUserName': 'sys', 'ToUserName': SETTINGS['corpid'],
                 'CreateTime': int(time.time())}
        self.assertEqual(ask_socket(server.address, *delivery(json.dumps(event)))[::2], (200, b''))
        self.assertEqual(self.post(server, message()), 403)
        self.assertEqual(self.runs, ['应用', '机器人', 'x'])
        for crypt in self.crypt, CRYPT:
            encrypt, now = crypt.seal('1616140317555161061'), str(int(time.time()))
            query = {'msg_signature': crypt.sign(now, '1', encrypt), 'timestamp': now, 'nonce': '1', 'echostr': encrypt}
            self.assertEqual(ask_socket(server.address, 'GET', '/weixin?' + urllib.parse.urlencode(query))[::2],
                             (200, b'1616140317555161061'))
        self.assertRaises(ConfigError, server.bot.send, 'x', 'li.lei')

    def test_wsgi_and_handle_answer_too(self):
        server = self.server()
        method, target, body = self.request(self.message('快'))
        status, headers, answer = server.handle(method, target, body)
        self.assertEqual((status, dict(headers)['Content-Type']), (200, 'text/plain; charset=utf-8'))
        self.assertEqual(self.opened(answer, target)['stream']['content'], '快')

        def wsgi(msg):
            _, target, body = self.request(msg)
            environ = {'REQUEST_METHOD': 'POST', 'SCRIPT_NAME': '', 'PATH_INFO': '/weixin', 'SERVER_NAME': 'nas',
                       'QUERY_STRING': target.partition('?')[2], 'CONTENT_LENGTH': str(len(body)), 'SERVER_PORT': '80',
                       'SERVER_PROTOCOL': 'HTTP/1.1', 'wsgi.input': io.BytesIO(body), 'wsgi.errors': io.StringIO(),
                       'wsgi.version': (1, 0), 'wsgi.url_scheme': 'http', 'wsgi.multithread': True,
                       'wsgi.multiprocess': False, 'wsgi.run_once': False}
            started = []
            answer = wsgiref.validate.validator(server)(environ, lambda *args: started.append(args))
            with contextlib.closing(answer):
                data = b''.join(answer)
            self.assertEqual(started[0][0], '200 OK')
            return self.opened(data, target)['stream']
        stream = wsgi(self.message('x 慢'))
        self.assertFalse(stream['finish'])
        self.go.set()
        self.wait_for(lambda: not server._left())
        last = wsgi(self.message(msgtype='stream', text=None, stream={'id': stream['id']}))
        self.assertEqual((last['finish'], last['content']), (True, 'x'))

    def test_without_aes_it_says_how_to_get_it(self):
        code = ("import sys; sys.modules['Crypto'] = sys.modules['Cryptodome'] = None; import easywechat\n"
                "try: easywechat.WeChatServer('t', bot_id='aib1', token='t', encoding_aes_key='k' * 43)\n"
                "except ImportError as e: print('pycryptodome' in str(e))")
        env = dict(os.environ, EASYWECHAT_CONFIG=os.path.join(self.folder, 'nosuch.ini'))
        out = subprocess.run([sys.executable, '-c', code], cwd=HERE, env=env, stdout=subprocess.PIPE).stdout
        self.assertEqual(out.split(), [b'True'])

    def test_events_are_answered_in_their_own_way(self):
        server, url = self.server(), self.response_url()
        card, update = {'msgtype': 'template_card', 'template_card': self.CARD}, dict(self.CARD, task_id='T')
        data = {'card_type': 'button_interaction', 'event_key': 'ok', 'task_id': 'T'}
        new = {'response_type': 'update_template_card', 'template_card': update}
        text = {'msgtype': 'text', 'text': {'content': '您好'}}
        enter, press, feedback = 'enter_chat', 'template_card_event', 'feedback_event'
        for kind, gives, reply, posted in (
                (enter, '您好', text, []), (enter, card, card, []), (enter, ['您好', card], text, ['template_card']),
                (enter, None, {}, []), (press, new, new, []), (press, None, {}, []), (press, '已确认', {}, ['已确认']),
                (press, {'msgtype': 'update_template_card', 'template_card': update}, new, []),
                (press, {'MsgType': 'update_template_card', 'TemplateCard': easywechat._camel_case(update)}, new, []),
                (press, [new, '已确认'], new, ['已确认']), (press, card, {}, ['template_card']),
                (feedback, None, {}, []), (feedback, '谢谢', {}, ['谢谢']), ('nosuch', None, {}, []),
                ('', '好', {}, ['好'])):
            with self.subTest(kind=kind, gives=str(gives)[:60]):
                self.posted, self.gives[kind] = [], gives
                self.assertEqual(self.fast(server, self.event(kind, kind == press and data, response_url=url)), reply)
                self.wait_for(lambda: not server._left())
                self.assertEqual(self.texts(len(posted)) if posted else self.posted, posted)
        self.gives[enter] = self.picture('a.png', self.PNG)
        with self.assertLogs('easywechat', 'WARNING') as logs:
            self.assertEqual(self.fast(server, self.event(enter)), {})
        self.assertEqual(len(logs.output), 1)
        bare = WeChatServer('t', **dict(SETTINGS, corpid='', secret='', bot_id=self.BOT))
        bare.register_callback('text', self.callback)
        for kind in enter, press, feedback:
            method, target, body = self.request(self.event(kind))
            self.assertEqual(self.opened(bare.handle(method, target, body)[2], target), {})

    def test_events_answered_too_late(self):
        server, url = self.server(), self.response_url()
        gives = {'enter_chat': '您好', 'template_card_event': [
            {'response_type': 'update_template_card', 'template_card': self.CARD}, '已确认']}

        def slow(msg):
            self.go.wait(5)
            return gives[msg['Event']]
        server.register_callback('event', slow)
        jobs = [functools.partial(self.post, server, self.event(kind, response_url=url)) for kind in gives]
        self.assertEqual(self.at_once(jobs), [{}, {}])
        with self.assertLogs('easywechat', 'ERROR') as logs:
            self.go.set()
            self.assertEqual(sorted(self.texts(2)), ['已确认', '您好'])
            self.wait_for(lambda: not server._left())
        self.assertEqual((len(logs.output), 'too late' in logs.output[0]), (1, True))

    def test_a_card_alone_and_fast_is_the_answer(self):
        server, url = self.server(), self.response_url()
        card = {'msgtype': 'template_card', 'template_card': self.CARD}
        self.gives.update(card=card, both=['看', card])
        self.assertEqual(self.fast(server, self.message('card', response_url=url)), card)
        self.assertEqual(self.posted, [])
        stream = self.fast(server, self.message('both', response_url=url))['stream']
        self.assertEqual((stream['finish'], stream['content'], self.texts()), (True, '看', ['template_card']))
        stream = self.post(server, self.message('card 慢', response_url=url))['stream']
        self.go.set()
        self.assertEqual(self.until(server, stream['id'])['content'], '\uff08见下一条\uff09')
        self.assertEqual(self.texts(2), ['template_card'] * 2)
        self.gives['update'] = {'response_type': 'update_template_card', 'template_card': self.CARD}
        with self.assertLogs('easywechat', 'ERROR'):
            self.assertEqual(self.fast(server, self.message('update')), {})

    def test_stopping_closes_what_is_open(self):
        redis = Redis()
        one, two = self.server(store=redis), self.server(store=redis)

        def pieces():
            yield '前半'
            self.go.wait(5)
        self.gives['s'] = lambda msg: Stream(pieces())
        frames = self.at_once([functools.partial(self.post, one, self.message(what, what)) for what in ('s', 'x 慢')])
        ids = [frame['stream']['id'] for frame in frames]
        one.stop_within = 0.1
        with self.assertLogs('easywechat', 'WARNING') as logs:
            one.stop()
        self.assertEqual(sum('stopped before the answer' in line for line in logs.output), 2)
        last = [self.poll(two, stream_id) for stream_id in ids]
        self.assertEqual([(stream['finish'], stream['content']) for stream in last],
                         [(True, '前半…'), (True, '\uff08没有回复\uff09')])

    def test_nothing_is_left_behind(self):
        import gc

        def count():
            gc.collect()
            return sum(isinstance(thing, (easywechat._Poll, easywechat._Run)) for thing in gc.get_objects())
        server, before = self.server(), count()
        for n in range(1000):
            method, target, body = self.request(self.message('x', 'u%d' % (n % 9)))
            server.handle(method, target, body)
        self.assertTrue(self.wait_for(lambda: not server._once._runs and not server._left()))
        self.assertLess(count() - before, 9)
        most = server.store.max_entries
        self.assertLessEqual(sum(map(len, server.store._pages)), most)

    def test_what_no_callback_was_free_for_keeps_its_place(self):
        for store in None, FileStore(os.path.join(self.folder, 'cache')):
            self.go.clear()
            self.runs.clear()
            server = self.server(store=store)
            server.max_callbacks = 1
            first, second = (self.post(server, self.message(content))['stream'] for content in ('a 慢', 'b'))
            self.assertFalse(second['finish'])
            time.sleep(2 * server.lease)        # 租期也一直续着
            self.assertFalse(self.poll(server, second['id'])['finish'])
            self.assertEqual(self.runs, ['a'])
            self.go.set()
            self.until(server, first['id'])
            self.assertEqual(self.until(server, second['id'])['content'], 'b')
            self.assertTrue(self.wait_for(lambda server=server: not server._left() and not server._once._runs))
            self.assertEqual(self.runs, ['a', 'b'])
            server.stop()


class MailTests(ClientCase):
    """一封信从标准输入到手机。"""

    def mail(self, data, *args, **env):
        settings = dict(self.wecom.settings, api_base=self.url)
        env = dict({'EASYWECHAT_' + k.upper(): v for k, v in settings.items()}, **env)
        return run_cli('--mail', *args, stdin=data, **env)

    def test_what_other_programs_write(self):
        self.wecom.per_member = 1000
        for what, (data, text) in MAILS.items():
            for end in (b'\n', b'\r\n'):
                with self.subTest(what, end=end):
                    self.assertEqual(self.mail(data.replace(b'\n', end), PYTHONIOENCODING='utf-8'), (0, '', ''))
                    sent = self.wecom.messages.pop()
                    self.assertEqual((sent['touser'], self.wecom.messages), ('zhangsan', []))
                    self.assertEqual(sent['text']['content'], text)
        self.assertEqual(self.mail(b''), (0, '', ''))           # cron：没有输出
        self.assertEqual(self.wecom.messages, [])

    def test_any_bytes_are_a_mail(self):
        rng, mails = random.Random(3), [data for data, _ in MAILS.values()]
        for n in range(150):
            data = bytearray(rng.choice(mails))
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(len(data) + 1)
                data[at:at + rng.randint(0, 20)] = rng.choice(
                    (b'', b'\n', b'--', b'=?', b'?=', b'boundary=', b'\xff', b'\0', b'"'))
            with self.subTest(n, data=bytes(data)), tempfile.TemporaryDirectory() as folder:
                lines = itertools.chain(io.BytesIO(data), itertools.repeat(b''))
                text, *files = easywechat._read_mail(lambda lines=lines: next(lines), folder)
                self.assertTrue(text.strip())

    def test_attachments_are_files(self):
        png = os.urandom(9000)
        base64 = binascii.b2a_base64
        lines = b''.join(base64(png[i:i + 57]) for i in range(0, len(png), 57))
        data = (b'Subject: report\nContent-Type: multipart/mixed; boundary=A\n\n--A\n'
                b'Content-Type: multipart/alternative; boundary=B\n\n--B\nContent-Type: text/plain\n\nsee below\n'
                b'--B\nContent-Type: text/html\n\n<p>no</p>\n--B--\n'
                b'--A\nContent-Type: image/png; name="x.png"\nContent-Transfer-Encoding: base64\n'
                b'Content-Disposition: attachment; filename="=?UTF-8?B?' + base64('../照片.png'.encode()).strip() +
                b'?="\n\n' + lines +
                b'--A\nContent-Type: text/plain\nContent-Disposition: attachment; '
                b'filename*=utf-8\'\'%E6%97%A5%E5%BF%97.log\nContent-Transfer-Encoding: quoted-printable\n\n'
                b'a log =E6=97=A5\n'
                b'--A\nContent-Type: message/rfc822\n\n'
                b'Subject: inner\n\nbody\n--A\nContent-Type: application/pgp-signature; name=s.asc\n\nxxxxxxxx\n'
                b'--A\nContent-Type: application/zip; name=tiny.zip\n\nx\n--A--\n')
        self.assertEqual(self.mail(data, '--to', 'lisi', PYTHONIOENCODING='utf-8'), (0, '', ''))
        sent = [(m['msgtype'], m[m['msgtype']].get('content') or self.wecom.media[m[m['msgtype']]['media_id']]['name'])
                for m in self.wecom.messages]
        self.assertEqual(sent, [
            ('text', 'report\n\nsee below\n\n\uff08附件没有发\uff1atiny.zip 只有 2 字节，要大于 5 字节\uff09'),
            ('image', '照片.png'), ('file', '日志.log'), ('file', 'mail.eml')])
        self.assertEqual({m['touser'] for m in self.wecom.messages}, {'lisi'})
        media = [m['data'] for m in self.wecom.media.values()]
        self.assertEqual(media[:2], [png, 'a log 日\n'.encode()])

    def test_exit_codes_are_of_sysexits(self):
        mail = b'Subject: x\n\ny\n'
        for answer, code in (({'errcode': 60020, 'errmsg': 'x'}, 69), ({'errcode': 45009, 'errmsg': 'x'}, 75),
                             ('lost', 75)):
            self.wecom.script('message/send', answer)
            self.assertEqual(self.mail(mail)[0], code)
        self.assertEqual(self.mail(mail, EASYWECHAT_API_BASE='ftp://x')[0], 78)
        self.assertEqual(self.mail(mail, EASYWECHAT_AGENTID='x')[0], 78)
        self.assertEqual(run_cli('--mail', stdin=mail)[0], 78)

    @unittest.skipUnless(os.name == 'posix', '符号链接')
    def test_it_is_a_sendmail(self):
        home, sbin = (os.path.join(self.folder, name) for name in ('home', 'sbin'))
        os.mkdir(home)
        os.mkdir(sbin)
        link = os.path.join(sbin, 'sendmail')
        os.symlink(shutil.copy(SOURCE, home), link)
        with open(os.path.join(home, 'config.ini'), 'w') as f:
            settings = dict(self.wecom.settings, api_base=self.url)
            f.write('[demo]\n' + '\n'.join('%s = %s' % i for i in settings.items()))
        os.chmod(f.name, 0o600)

        def sendmail(*args, stdin=b'Subject: x\n\none\n.\ntwo\n'):
            done = subprocess.run([sys.executable, link] + list(args), input=stdin, cwd=sbin, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env=dict(os.environ, XDG_CACHE_HOME=home))
            return done.returncode, done.stdout, done.stderr
        for args, text in ((('-FCronDaemon', '-i', '-B8BITMIME', '-oem', 'root'), 'x\n\none\n.\ntwo'),
                           (('-t', '-oi', '-f', 'root@nas'), 'x\n\none\n.\ntwo'),
                           (('-bm', 'root', 'lisi'), 'x\n\none')):
            self.assertEqual(sendmail(*args), (0, b'', b''))
            sent = self.wecom.messages.pop()
            self.assertEqual((sent['text']['content'], sent['touser']), (text, 'zhangsan'))
        for option in '-bs', '-bd', '-bp', '-q':
            self.assertEqual(sendmail(option)[0], 64)
        self.assertEqual(self.wecom.messages, [])


# ---- 命令行 Command line ----------------------------------------------------------------------

class CommandTests(unittest.TestCase):

    @contextlib.contextmanager
    def echo(self, *args, **env):
        """`--echo` 在空目录里跑着 →（进程，端口，开头的输出）。"""
        with tempfile.TemporaryDirectory() as folder:
            env = dict(os.environ, PYTHONIOENCODING='utf-8', **env)
            source = shutil.copy(SOURCE, folder)
            process = subprocess.Popen([sys.executable, source, '--echo', '--port', '0'] + list(args),
                                       cwd=folder, env=env, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
            lines = []
            for line in iter(process.stdout.readline, b''):
                lines.append(line.decode())
                if '在监听' in lines[-1]:
                    break
            try:
                yield process, re.search(r':(\d+)/', lines[-1]).group(1), ''.join(lines)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
                process.stdout.close()
                process.stderr.close()

    def test_a_probe_does_not_wait_for_ever_on_a_trickle(self):
        begin = time.monotonic()
        with swapped(easywechat, '_PATIENCE', 0.5):
            code, out, err = run_cli('--probe', 'x', '--url', stand_in(self, trickle) + '/weixin')
        self.assertEqual((code, out), (3, ''))
        self.assertIn('no complete answer from 127.0.0.1:', err)
        self.assertLess(time.monotonic() - begin, 2)

    def test_echo_shows_the_exchange_and_probe_talks_to_it(self):
        with self.echo() as (process, port, output):
            self.assertEqual(output.count('你好，EasyWeChat'), 2)
            self.assertNotIn(easywechat._DEMO['encoding_aes_key'], output)
            code, out, err = run_cli('--probe', '你好，世界', '--port', port, PYTHONIOENCODING='utf-8', LC_ALL='C')
            self.assertEqual((code, out.strip(), err), (0, '你好，世界', ''))
            code, out, err = run_cli('--probe', '你好', '--port', port, LC_ALL='C', LANG='C')
            self.assertIn(out.strip(), ('你好', '\\u4f60\\u597d'))
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=10)
            self.assertEqual((process.returncode, err), (0, b''))

    def test_demo_keeps_to_this_machine(self):
        for args in (['--echo', '--host', '0.0.0.0'], ['--probe', 'x', '--url', 'http://192.0.2.1/']):
            code, out, err = run_cli(*args)
            self.assertEqual((code, out), (2, ''))
            self.assertRegex(err, r'^easywechat: [^\n]+\n$')

    def test_exit_codes(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
            code, out, err = run_cli('--probe', 'x', '--port', port)
        self.assertEqual((code, out), (3, ''))
        self.assertIn('easywechat.py --echo --port %s\uff08' % port, err)
        self.assertEqual(run_cli()[0], 2)
        self.assertEqual(run_cli('--probe', 'x', '--config', 'no.ini')[0], 2)
        for url in ('http://[::1/x', 'ftp://x/', 'http://127.0.0.1:99999/', 'http://127.0.0.1/微信', 'x'):
            self.assertEqual(run_cli('--probe', 'x', '--url', url)[0], 2, url)
        with open(SOURCE, 'rb') as f:
            source = f.read()
        line = 'EasyWeChat %s, %s' % (easywechat.__version__, easywechat.__date__)
        self.assertEqual(run_cli('--version'), (0, '%s\nSHA-256 %s\n' % (line, hashlib.sha256(source).hexdigest()), ''))
        name, version, date = line.replace(',', '').split()
        self.assertIn('%s %s（%s）：' % (name, version, date), source[:200].decode('utf-8', 'ignore'))
        with self.echo() as (process, port, output):
            self.assertEqual(run_cli('--echo', '--port', port)[0], 2)
            code, out, err = run_cli('--echo', EASYWECHAT_CORPID='ww1', EASYWECHAT_TOKEN='t',
                                     EASYWECHAT_ENCODING_AES_KEY='k' * 42 + '_')
            self.assertEqual((code, out), (2, ''))
            self.assertIn('现在是 42 个，还有 1 个别的字符', err)
            code, out, err = run_cli('--probe', 'x', '--port', port, EASYWECHAT_CORPID='ww1',
                                     EASYWECHAT_TOKEN='t', EASYWECHAT_ENCODING_AES_KEY='k' * 43)
            self.assertEqual((code, out), (1, ''))
            self.assertIn('403', err)

    def test_a_program_ends_with_one_sentence(self):
        def fails(error):
            raise error
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            table = [
                (lambda: None, 0, ''), (lambda: 7, 7, ''),
                (lambda: fails(KeyboardInterrupt()), 130, 'bot: 被打断了'),
                (lambda: get_config('x', 'nosuch.ini'), 2, 'bot: 没有找到配置'),
                (lambda: open('/nosuch/x'), 2, 'bot: /nosuch/x：没有这个文件'),
                (lambda: fails(ImportError('没有 x')), 2, 'bot: 没有 x'),
                (lambda: fails(NetworkError(503, 'x')), 3, 'bot: '),
                (lambda: fails(APIError(60020, 'x', 'agent/get')), 1, 'bot: '), (lambda: fails(SystemExit(5)), 5, ''),
                (lambda: make_server().start('127.0.0.1', port), 2,
                 'bot: 不能监听 127.0.0.1 的 %d 端口，已经有程序在用：停掉它，或换一个端口' % port),
                (lambda: make_server().run('127.0.0.1', port), 2, 'EasyWeChat 不能监听 127.0.0.1 的 %d 端口' % port),
                (lambda: make_server().start('127.0.0.1', 99999), 2, 'bot: 不能监听 127.0.0.1 的 99999 端口'),
                (lambda: make_server().start('192.0.2.1', 0), 2,
                 'bot: 不能监听 192.0.2.1 的 0 端口，这台机器没有这个地址')]
            for run, code, words in table:
                with contextlib.redirect_stderr(io.StringIO()) as err, swapped(sys, 'argv', ['/opt/bot.py', 'x']), \
                        contextlib.redirect_stdout(io.StringIO()), self.assertRaises(SystemExit) as ended:
                    easywechat.command(run)
                self.assertEqual((ended.exception.code, err.getvalue()[:len(words)], err.getvalue().count('\n')),
                                 (code, words, bool(words)), err.getvalue())
            with self.assertRaises(OSError) as caught:
                make_server().start('127.0.0.1', port)
            self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
        with self.assertRaises(ZeroDivisionError):      # 程序自己的错要看得到在哪里
            easywechat.command(lambda: 1 / 0)

    def test_a_terminal_without_chinese_gets_escapes(self):
        program = "import easywechat; easywechat.command(lambda: print('你好') or 3)"
        done = subprocess.run([sys.executable, '-c', program.encode()], cwd=HERE, stdout=subprocess.PIPE,
                              env=dict(os.environ, PYTHONIOENCODING='ascii', LC_ALL='C.UTF-8'))
        self.assertEqual((done.returncode, done.stdout.strip()), (3, b'\\u4f60\\u597d'))

    def test_the_program_of_the_readme_runs_as_it_stands(self):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            program = re.search(r'```python\n(.*?)```', f.read(), re.S).group(1)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (('bot.py', program.replace('port=8000', 'port=0')),
                               ('config.ini', easywechat._CONFIG_TEMPLATE.format(**SETTINGS))):
                with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
                    f.write(text)
                os.chmod(os.path.join(folder, name), 0o600)
            bot = subprocess.Popen([sys.executable, os.path.join(folder, 'bot.py')], cwd=HERE,
                                   env=dict(os.environ, PYTHONPATH=HERE, PYTHONIOENCODING='utf-8'),
                                   stderr=subprocess.PIPE)
            port = int(re.search(r'0\.0\.0\.0:(\d+)', bot.stderr.readline().decode()).group(1))
            reply = opened(ask_socket(('127.0.0.1', port), *delivery(message(Content='在')))[2])
            bot.send_signal(signal.SIGINT)
            self.assertEqual(bot.communicate(timeout=10)[1], b'')
        self.assertEqual((reply['Content'], bot.returncode), ('在', 0))

    def test_the_demo_example_echoes_and_counts(self):
        space = {'__name__': 'demo', '__file__': os.path.join(HERE, 'examples', 'demo.py')}
        with open(space['__file__'], encoding='utf-8') as f:
            exec(compile(f.read(), 'demo.py', 'exec'), space)
        server = make_server(space['reply_func'])
        server.register_callback('text', space['Counter']().reply)
        for n in 1, 2:
            reply = opened(server.handle(*delivery(message(Content='嗨')))[2])
            self.assertEqual(reply['Content'], '嗨（第 %d 句）' % n)
        reply = opened(server.handle(*delivery(message(MsgType='image', MediaId='M')))[2])
        self.assertEqual(reply['Image'], {'MediaId': 'M'})

    def test_init_writes_once_and_prints_no_secret(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'config.ini')
            code, out, err = run_cli('--init', '--config', path)
            self.assertEqual((code, out), (0, path + '\n'))
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
            config = get_config('demo', path)
            WXBizMsgCrypt(config['token'], config['encoding_aes_key'], 'ww')
            self.assertNotIn(config['token'], out + err)
            self.assertEqual(run_cli('--init', '--config', path)[0], 2)
            self.assertEqual(get_config('demo', path), config)


class SendCommandTests(ClientCase):

    def run_cli(self, *args, stdin=b'', **env):
        env = dict({'EASYWECHAT_' + k.upper(): v for k, v in self.wecom.settings.items()},
                   EASYWECHAT_API_BASE=self.url, PYTHONIOENCODING='utf-8', **env)
        return run_cli(*args, stdin=stdin, **env)

    def test_send(self):
        self.assertEqual(self.run_cli('--send', '磁盘 91%', LC_ALL='C'), (0, '', ''))
        self.assertEqual(self.run_cli('--send', '-', '--to', 'lisi', stdin='第一行\n第二行\n'.encode()), (0, '', ''))
        self.assertEqual(self.run_cli('--send', '-', stdin=b'\n'), (0, '', ''))
        self.assertEqual(self.run_cli('--send', '# x', '--markdown', '--party', '1|2', LC_ALL='C')[0], 0)
        self.assertEqual(self.run_cli('--send-file', str(self.file('a.png')), '--tag', '1')[0], 0)
        sent = [(m['msgtype'], m.get('touser'), m[m['msgtype']].get('content')) for m in self.wecom.messages]
        self.assertEqual(sent, [
            ('text', 'zhangsan', '磁盘 91%'), ('text', 'lisi', '第一行\n第二行'), ('markdown', None, '# x'),
            ('image', None, None)])
        self.assertEqual(self.run_cli('--send', '# x', '--robot', '--markdown')[0], 0)
        self.assertEqual(self.run_cli('--send', '你好', '--robot', '--to', '@all')[0], 0)
        self.assertEqual(self.wecom.robot_messages[1]['text'], {
            'content': '你好', 'mentioned_list': ['@all'], 'mentioned_mobile_list': []})

    def test_what_others_call_things_is_text(self):
        name = 'x" --markdown --to @all --retry "600'
        for argv, text in (
                (['--send', '--', name], name), (['--send', '--', '--to', '@all'], '--to @all'),
                (['--send', '--', '-18℃'], '-18℃'), (['--to', 'lisi', '--send', '--', 'a', '--', 'b'], 'a -- b'),
                (['--send', '--', '<a href="http://evil.example">点我</a> ok'], '点我 ok'),
                (['--send', '--', '<<a>a href="http://evil.example">点我</a>'], '\uff1ca href="http://evil.example">点我'),
                (['--send', '--', '3 < 5 > 2 <中> </A><br/>'], '3 < 5 > 2 <中> '),
                (['--send', '<a href="https://nas.example">面板</a>'], '<a href="https://nas.example">面板</a>'),
                (['--send', '--', '$(reboot) `id` ; | % \\'], '$(reboot) `id` ; | % \\')):
            with self.subTest(argv=argv):
                self.assertEqual(self.run_cli(*argv), (0, '', ''))
                sent = self.wecom.messages.pop()
                who = 'lisi' if 'lisi' in argv else 'zhangsan'
                self.assertEqual((sent['text']['content'], sent['touser']), (text, who))
        path = str(self.file('a.png'))
        self.assertEqual(self.run_cli('--send-file', '--', path)[0], 0)
        for argv in (['--', 'x'], ['--send', 'x', '--', 'y'], ['--send', '-', '--', 'y'], ['--echo', '--', 'x'],
                     ['--send', '--'], ['--send', '--', ' '], ['--send']):
            with self.subTest(argv=argv):
                self.assertEqual(self.run_cli(*argv)[0], 2)
        self.assertEqual(len(self.wecom.messages), 1)

    def test_a_torrent_cannot_give_options(self):
        def split(command):             # QProcess::splitCommand，qBittorrent 4.1.7 起的：先代入，再分
            words, quotes, quoted, word = [], 0, False, ''
            for character in command + ' ':
                if character == '"':
                    quotes += 1
                    if quotes == 3:
                        quotes, word = 0, word + '"'
                    continue
                if quotes:
                    quoted ^= quotes == 1
                    quotes = 0
                if not quoted and character.isspace():
                    words += [word] if word else []
                    word = ''
                else:
                    word += character
            return words + ([word] if word else [])
        self.assertEqual(split('a "b c" """d""" "e'), ['a', 'b c', '"d"', 'e '])
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            recipe = re.search('^python3 /opt/bot/easywechat.py (.*%N.*)$', f.read(), re.M).group(1)
        for name in ('x" --markdown --to @all --retry "600', '" --config /etc/shadow "', 'x" -- --to @all',
                     '--send-file /etc/shadow', '<a href="http://evil.example">x</a>', 'Debian 13 "netinst"'):
            argv = split(recipe.replace('%N', name))
            with self.subTest(name=name):
                self.assertEqual(self.run_cli(*argv), (0, '', ''))
                sent = self.wecom.messages.pop()
                self.assertEqual((sent['touser'], sent['msgtype']), ('zhangsan', 'text'))
                self.assertTrue(sent['text']['content'].startswith('下载完成'))
                self.assertNotIn('<a', sent['text']['content'])

    def test_exit_codes(self):
        for args, code, words in (
                (['--send', ''], 2, '没有要发的文字'), (['--send-file', '/nosuch'], 2, 'nosuch'),
                (['--send', 'x', '--to', 'nobody'], 1, '可见范围'),
                (['--send', 'x', '--robot', '--party', '1'], 2, '--party'),
                (['--send-file', os.curdir], 2, '这是一个目录'),
                (['--sned', 'x'], 2, '没有 --sned 这个选项，是不是 --send；'), ([], 2, '没有写要做什么'),
                (['--send', 'x', '--to'], 2, '--to 后面少了一个值'),
                (['--explain', 'x'], 2, '--explain 后面应该是数字'),
                (['--send-file', SOURCE, '--markdown'], 2, '不能和 --send-file 一起用'),
                (['--echo', '--init'], 2, '不能一起用'),
                (['--send', 'x', '--retry', 'nan'], 2, '应该是秒数'), (['--send', 'x', 'y'], 2, '不认得 y；有哪些：')):
            got, out, err = self.run_cli(*args)
            self.assertEqual((got, out), (code, ''), err)
            self.assertRegex(err, r'^easywechat: [^\n]+\n$')
            self.assertIn(words, err)
        self.wecom.script('message/send', 'lost')
        got, out, err = self.run_cli('--send', 'x', '--retry', '60')       # 可能到了的，不重发
        self.assertEqual((got, out, len(self.wecom.messages)), (3, '', 1))
        self.assertIn('may have been delivered', err)

    def test_retry_waits_for_the_network(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        wecom = simulator.WeCom()
        self.addCleanup(wecom.stop)
        late = threading.Timer(0.3, wecom.start, ('127.0.0.1', port))
        late.start()

        class Quick(WeChatClient):
            tries = 1
        client = Quick('t', store=MemoryStore(), api_base='http://127.0.0.1:%d' % port, **wecom.settings)
        client.retry_within, client.pause = 30, 0.05
        client.send('断网了')
        self.assertEqual(len(wecom.messages), 1)

    def test_check(self):
        code, out, err = self.run_cli('--check', EASYWECHAT_ENCODING_AES_KEY='k' * 43)
        self.assertEqual((code, out.count('✗'), err), (0, 0, ''), out)
        for words in 'DNS', '时钟', 'gettoken', '出口 IP 可信', '应用「监控」':
            self.assertIn(words, out)
        self.wecom.trusted = False
        code, out, err = self.run_cli('--check', EASYWECHAT_TOKEN='全角 token')
        self.assertEqual((code, err.splitlines()[-1]), (1, 'easywechat: 有 2 处要改，见上面的 ✗'))
        self.assertIn('203.0.113.9', out)
        self.assertIn('空白、全角', out)
        self.assertIn('来自 environment', out)

    def test_check_finds_what_the_rest_would_refuse(self):
        for key, value, words in (
                ('route_name', '微信', 'route_name'), ('log_path', '/nosuch', '写不了日志'),
                ('token', '', '没有写 token'),
                ('encoding_aes_key', '', '没有写 encoding'), ('agentid', '', '有 secret，没有 agentid'),
                ('api_base', 'ftp://x', 'api_base 应该像'), ('robot', 'https://x/', '应该是 Webhook 地址')):
            with self.subTest(key):
                settings = dict(self.wecom.settings, secret='s' * 43, api_base=self.url)
                settings.update({'encoding_aes_key': 'k' * 43, key: value})
                config = '[demo]\n%s\n[system]\n%s' % tuple(
                    '\n'.join('%s = %s' % i for i in settings.items() if (i[0] in ('route_name', 'log_path')) == system)
                    for system in (False, True))
                path = os.path.join(self.folder, 'config.ini')
                with open(path, 'wb') as f:
                    f.write(config.encode())
                os.chmod(path, 0o600)
                code, out, err = run_cli('--check', '--config', path)
                self.assertEqual((code, words in out), (1, True), out)
                if key not in ('agentid', 'robot'):
                    args = ['--echo', '--port', '0'] if key != 'api_base' else ['--send', 'x']
                    self.assertEqual(run_cli(*args, '--config', path, LC_ALL='C')[0], 2)
        with open(path, 'a') as f:
            f.write('\n# x')
        os.chmod(path, 0o640)
        out = run_cli('--check', '--config', path)[1]
        self.assertIn('(0640)', out)

    def test_nobody_reads_the_rest(self):
        env = dict(os.environ, PYTHONIOENCODING='utf-8', **{'EASYWECHAT_CORPID': 'ww'})
        process = subprocess.Popen([sys.executable, SOURCE, '--check'], env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        process.stdout.close()
        with process.stderr:
            self.assertEqual((process.stderr.read(), process.wait(10)), (b'', 0))

    def test_what_comes_on_standard_input(self):
        for data, text in (
                ('磁盘\n'.encode(), '磁盘'), ('磁盘'.encode('gb18030'), '磁盘'), ('磁盘\r\n'.encode('utf-16'), '磁盘'),
                (b'\xfe\xff' + '磁盘'.encode('utf-16-be'), '磁盘'), ('磁盘'.encode('utf-8-sig'), '磁盘'),
                (b'a\tb\n\nc', 'a\tb\n\nc')):
            with self.subTest(data):
                self.assertEqual(self.run_cli('--send', '-', stdin=data), (0, '', ''))
                self.assertEqual(self.wecom.messages.pop()['text']['content'], text)
        for data in (b'a\x00b', b'\x1b[31mred', b'\xff\xff\xff', '磁盘 9'.encode('utf-16-le'), b'\x7fELF',
                     b'x' * ((1 << 20) + 1)):
            with self.subTest(data[:9]):
                code, out, err = self.run_cli('--send', '-', stdin=data)
                self.assertEqual((code, out, err.count('\n')), (2, '', 1), err)
        self.assertEqual(self.wecom.messages, [])

    def test_what_looks_like_an_option_and_is_none(self):
        for text in '-18℃', '-5', '- a', '--- x ---', '-x\n二', '--a b', '一\\n二':
            with self.subTest(text):
                self.assertEqual(self.run_cli('--send', text), (0, '', ''))
                self.assertEqual(self.wecom.messages.pop()['text']['content'], text)
        for args in ['--send', '--to'], ['--send', '--nosuch']:
            self.assertEqual(self.run_cli(*args)[0], 2)
        self.assertEqual(self.run_cli('--send', 'x', '--robot', '--markdown', '--to', 'zhangsan;lisi')[0], 0)
        self.assertEqual(self.wecom.robot_messages[-1]['markdown']['content'], '<@zhangsan><@lisi>\nx')

    def test_codes_are_explained(self):
        code, out, err = run_cli('--explain', '60020', '-1', '41001')
        self.assertEqual((code, out.count('\n'), err), (0, 3, ''))
        self.assertIn('可信IP', out)
        code, out, err = run_cli('--explain', '123456')
        self.assertEqual((code, out), (1, ''))
        self.assertIn('全局错误码', err)

    def test_log_lines_have_a_time_unless_the_program_has_its_own(self):
        code = ("import logging, sys, easywechat\n"
                "if len(sys.argv) > 1: logging.basicConfig(format='%(message)s own')\n"
                "easywechat.logger.warning('one')\neasywechat.logger.info('two')\n")
        for args, form in ([], rb'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING one\r?\n'), (['own'], rb'one own\r?\n'):
            done = subprocess.run([sys.executable, '-c', code] + args, cwd=HERE, stderr=subprocess.PIPE)
            self.assertRegex(done.stderr, b'\\A' + form + b'\\Z')

    def test_sending_needs_no_aes(self):
        code = ("import sys; sys.modules['Crypto'] = sys.modules['Cryptodome'] = None; import easywechat; "
                "sys.exit(easywechat.main(['--send', 'x']))")
        env = dict({'EASYWECHAT_' + k.upper(): v for k, v in self.wecom.settings.items()},
                   EASYWECHAT_API_BASE=self.url, XDG_CACHE_HOME=self.folder)
        shutil.copy(SOURCE, self.folder)
        self.assertEqual(subprocess.call([sys.executable, '-c', code], cwd=self.folder, env=dict(os.environ, **env)), 0)
        self.assertEqual(len(self.wecom.messages), 1)


# ---- 文件对自己的许诺 -------------------------------------------------------------------------

#: 没有 sys.argv[1] 里的那些模块，自问自答，发一条，每个示例说说自己。
SMALL = """
import contextlib, io, json, os, sys
for name in sys.argv[1].split():
    sys.modules[name] = None
sys.path.insert(0, 'examples')
import easywechat
server = easywechat.WeChatServer('x', **easywechat._DEMO)
server.register_callback('*', easywechat._echo)
url = 'http://%s:%d/weixin' % server.start('127.0.0.1', 0)
print(easywechat._probe(url, server.settings, 'ok')[1]['Content'])
server.handle('GET', '/nosuch')
server.stop()
print(easywechat.main(['--send', sys.argv[1]]))
for example in 'demo llm_bot monkey_monitor nas_monitor ticket_watcher simulator'.split():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            __import__(example).main(['--help'])
        except SystemExit as e:
            assert not e.code, example
    assert len(out.getvalue()) > 100, example
"""


def columns(line):
    """终端上占几列。"""
    return sum(1 + (unicodedata.east_asian_width(char) in 'WF') for char in line)


class PromiseTests(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(SOURCE, encoding='utf-8') as f:
            cls.source = f.read()
        cls.tree = ast.parse(cls.source)

    def test_nothing_is_used_before_it_is_defined(self):
        defined, forward = {}, set()
        for node in self.tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
                n.id for t in getattr(node, 'targets', []) for n in ast.walk(t)
                if isinstance(n, ast.Name)]
            for name in names:
                defined.setdefault(name, node.lineno)
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                forward |= {(node.name, n.id) for n in ast.walk(node) if isinstance(n, ast.Name)
                            and defined.get(n.id, 0) > node.lineno}
        self.assertEqual(forward, set())

    def test_no_name_is_bound_twice(self):
        names = [node.name for node in self.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        self.assertEqual([name for name, count in collections.Counter(names).items() if count > 1], [])

    def test_only_the_standard_library_and_aes_are_imported(self):
        code = ("import sys, http.server; before = set(sys.modules); import easywechat; "
                "print(' '.join(set(sys.modules) - before))")
        out = subprocess.run([sys.executable, '-c', code], cwd=HERE, stdout=subprocess.PIPE,
                             check=True).stdout.decode().split()
        roots = {name.split('.')[0] for name in out}
        self.assertFalse(roots & {'Crypto', 'Cryptodome', 'argparse', 'asyncio', 'concurrent', 'typing', 'queue',
                                  'uuid', 'decimal', 'sqlite3', 'dataclasses', 'multiprocessing'})

    def test_it_runs_without_what_small_systems_leave_out(self):
        wecom = simulator.WeCom()
        wecom.per_member = 1000
        url = wecom.start()
        self.addCleanup(wecom.stop)
        left_out = ['logging', 'ssl _ssl', 'unicodedata encodings.idna stringprep', 'decimal _decimal', 'asyncio',
                    'pydoc', 'multiprocessing', 'sqlite3', 'unittest', 'uuid _uuid', 'lzma bz2', '_codecs_cn',
                    'readline']
        with tempfile.TemporaryDirectory() as folder:
            settings = dict(wecom.settings, api_base=url)
            env = dict(os.environ, EASYWECHAT_CONFIG='', XDG_CACHE_HOME=folder, PYTHONIOENCODING='utf-8', **{
                'EASYWECHAT_' + k.upper(): v for k, v in settings.items()})
            rows = [(names, subprocess.Popen([sys.executable, '-c', SMALL, names], cwd=HERE, env=env,
                                             stdout=subprocess.PIPE, stderr=subprocess.PIPE))
                    for names in left_out + [' '.join(left_out)]]
            for names, process in rows:
                with self.subTest(names):
                    out, err = process.communicate(timeout=60)
                    self.assertEqual((out.split(), process.returncode), ([b'ok', b'0'], 0), err)
                    self.assertIn(b'expected /weixin', err)
        self.assertEqual(sorted(m['text']['content'] for m in wecom.messages), sorted(names for names, _ in rows))

    def test_without_xml_it_still_sends(self):
        wecom = simulator.WeCom()
        settings = dict(wecom.settings, api_base=wecom.start())
        self.addCleanup(wecom.stop)
        code = ("import sys; sys.modules.update(dict.fromkeys(['xml', 'xml.etree', 'xml.etree.ElementTree']))\n"
                "import easywechat\nassert easywechat.main(['--send', 'x']) == 0\n"
                "easywechat.WeChatServer('demo', corpid='', secret='', bot_id='a', bot_secret='s')\n"
                "easywechat.command(lambda: easywechat.WeChatServer('demo'))")
        with tempfile.TemporaryDirectory() as folder:
            env = dict(os.environ, XDG_CACHE_HOME=folder, PYTHONIOENCODING='utf-8', **{
                'EASYWECHAT_' + key.upper(): value for key, value in settings.items()})
            done = subprocess.run([sys.executable, '-c', code], cwd=HERE, env=env, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, len(wecom.messages)), (2, 1), done.stderr)
        self.assertEqual(done.stderr.decode().strip(),
                         '-c: 收应用的消息要读 XML，这个 Python 没有：opkg install python3-xml')

    def test_without_aes_the_error_says_how_to_get_it(self):
        code = ("import sys, types; pycrypto = types.ModuleType('Crypto'); "
                "sys.modules['Crypto'] = sys.modules['Crypto.Cipher.AES'] = pycrypto; "
                "pycrypto.version_info = (2, 6, 1); "
                "sys.modules['Cryptodome'] = None; "
                "import easywechat; sys.exit(easywechat.main(['--echo']))")
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, '-c', code], cwd=folder, stderr=subprocess.PIPE,
                                  env=dict(os.environ, PYTHONPATH=HERE))
        self.assertEqual(done.returncode, 2)
        self.assertIn(b'apt install python3-pycryptodome', done.stderr)

    @unittest.skipIf(sys.flags.optimize > 1, '-OO 去掉了 docstring')
    def test_every_public_name_is_documented(self):
        for name in easywechat.__all__:
            thing = getattr(easywechat, name)
            self.assertTrue(thing.__doc__, name)
            for attribute, value in vars(thing).items() if isinstance(thing, type) else ():
                if callable(value) and not attribute.startswith('_'):
                    self.assertTrue(value.__doc__, '%s.%s' % (name, attribute))

    def test_every_public_name_is_typed(self):
        for module_name, thing in vars(easywechat).items():
            if getattr(thing, '__module__', '') != 'easywechat' or module_name.startswith('_'):
                continue
            for name, value in vars(thing).items() if isinstance(thing, type) else [('', thing)]:
                value = inspect.unwrap(getattr(value, 'fget', getattr(value, '__func__', value)))
                if inspect.isfunction(value) and (name in ('__init__', '__call__', '__iter__') or name[:1] != '_'):
                    with self.subTest(module_name + '.' + name):
                        wanted = set(inspect.signature(value).parameters) - {'self'} | {'return'}
                        self.assertEqual(wanted, set(value.__annotations__))

    @unittest.skipIf(sys.flags.optimize > 1, '-OO 去掉了 docstring')
    def test_help_shows_every_limit_as_it_is(self):
        for cls in easywechat.MemoryStore, WeChatClient, easywechat.WeChatBot, WeChatServer:
            text = inspect.cleandoc(cls.__doc__)
            told = dict(re.findall(r'^    (\w+) = (.*?) +# ', text, re.M))
            self.assertEqual([line for line in text.splitlines() if columns(line) > 76], [])
            parents = {WeChatClient: easywechat._Caller, WeChatServer: easywechat.Dispatcher}
            own = dict(vars(parents[cls]) if cls in parents else {}, **vars(cls))
            limits = {name for name, value in own.items()
                      if name[:1] != '_' and (value is None or isinstance(value, (int, float)))}
            with self.subTest(cls.__name__):
                self.assertLessEqual(limits, set(told))
                self.assertEqual({name: eval(value, {}) for name, value in told.items()},
                                 {name: getattr(cls, name) for name in told})

    @unittest.skipIf(sys.flags.optimize > 1, '-OO 去掉了 docstring')
    def test_the_examples_of_the_docstrings_are_true(self):
        found = doctest.DocTestFinder().find(easywechat, 'easywechat')
        results = [doctest.DocTestRunner().run(test) for test in found if test.examples]
        self.assertEqual([failed for failed, _ in results], [0] * 3)

    def test_functions_are_short(self):
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                last = max(getattr(n, 'lineno', 0) for n in ast.walk(node))
                doc = (ast.get_docstring(node, False) or '').count('\n')
                self.assertLessEqual(last - node.lineno - doc, 32, node.name)

    def test_readme_runs(self):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            readme = f.read()
        blocks = re.findall(r'```python\n(.*?)```', readme, re.S)
        self.assertTrue(blocks)
        wecom = simulator.WeCom()
        url = wecom.start()
        self.addCleanup(wecom.stop)
        with tempfile.TemporaryDirectory() as folder:
            settings = dict(wecom.settings, api_base=url, **SETTINGS)
            settings['corpid'] = wecom.settings['corpid']
            env = {'EASYWECHAT_' + k.upper(): v for k, v in settings.items()}
            with environment(XDG_CACHE_HOME=folder, **env):
                shutil.copy(os.path.join(HERE, 'README.md'), folder)
                with swapped(WeChatServer, 'run', lambda *args, **kwargs: None), working_in(folder):
                    for block in blocks:
                        space = {'__name__': 'readme', 'server': make_server(), 'easywechat': easywechat}
                        exec(compile(block, 'README.md', 'exec'), space)
        self.assertEqual([m['msgtype'] for m in wecom.messages], ['text', 'file', 'textcard'])

    def test_what_the_readme_names_is_in_the_code(self):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            readme = f.read()
        with open(SOURCE, encoding='utf-8') as f:
            said = re.sub(r"'\s*\n\s*'", '', f.read())     # 一句话分成几行写的
        keys = {key for row in re.findall(r'^\| `\[(?:demo|system)\] (.*?) \|', readme, re.M)
                for key in re.findall('\\w+', row)}
        self.assertEqual(keys, set(easywechat._APP_KEYS + easywechat._SYSTEM_KEYS) - {'appid'})
        known = easywechat._parser()._option_string_actions
        commands = re.findall(r'easywechat\.py ((?:--?[a-z-]+|[^\n`|;])*)', readme)
        used = {word for command in commands for word in re.findall(r'(?<![\w-])--[a-z-]+', command)}
        self.assertEqual({word for word in used if word not in known}, set())
        self.assertGreater(len(used), 12)
        log = re.search(r'\| 日志里 \|.*?\n\n', readme, re.S).group()
        for keyword in re.findall('`([^`]+)`', re.sub(r'(?m)\|[^|]*\|$', '', log)):
            for part in keyword.split('…'):
                self.assertIn(part.strip(), said, keyword)
        names = readme[readme.index('\n## API'):readme.index('\n## 从旧版迁移')]
        missing = {name for name in easywechat.__all__ if not re.search(r'\b%s\b' % name, names)}
        self.assertEqual(missing, set())
        public = set(easywechat.__all__).union(*(dir(getattr(easywechat, name)) for name in easywechat.__all__))
        told = re.findall(r'`([A-Za-z_]+)[`(]', names)
        others = set('errmsg errcode path hint wxcpt help'.split())     # 在实例里的，和 Python 的
        self.assertEqual({name for name in told if name not in public} - others, set())
        limits = readme[readme.index('\n## 已知限制'):readme.index('\n## 参考资料')]
        for number in (WeChatClient.per_minute, easywechat.WeChatBot.per_hour, easywechat.WeChatRobot.per_minute):
            self.assertRegex(limits, r'每\w+ %d 条' % number)

    def test_the_table_of_the_readme_is_the_catalogue(self):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            rows = re.findall(r'^\| ([0-9]+) \| (.*?) \| (.*) \|$', f.read(), re.M)
        self.assertEqual(len(rows), 10)
        for code, cause, advice in rows:
            shown = '%s %s\uff1a%s\n' % (code, cause, advice.replace('\\|', '|'))
            self.assertEqual(run_cli('--explain', code), (0, shown, ''))

    def test_no_secret_was_logged_by_any_test(self):
        text = LOG.getvalue()
        self.assertIn('refused', text)
        for secret in SECRETS:
            self.assertNotIn(secret, text)
        self.assertNotRegex(text, 'token[0-9]+_[0-9a-f]{20}')

    def test_reprs_hold_no_secret(self):
        server = make_server()
        shown = '%r %r %r %s' % (server, server.settings, server.wxcpt, server.settings)
        for secret in SETTINGS['token'], SETTINGS['encoding_aes_key']:
            self.assertNotIn(secret, shown)


def load_tests(loader, tests, pattern, part=0, parts=1):
    """节的顺序，示例的在后；许诺在最后，因为它们要看全部的日志：每个进程各看自己的，别的许诺只有一个进程看。"""
    sys.modules.setdefault('test_easywechat', sys.modules[__name__])
    import test_examples
    cases = [thing for module in (sys.modules[__name__], test_examples) for name, thing in vars(module).items()
             if name.endswith('Tests') and thing.__module__ == module.__name__ and thing is not PromiseTests]
    promises = [PromiseTests('test_no_secret_was_logged_by_any_test')] if part else \
        loader.loadTestsFromTestCase(PromiseTests)
    return unittest.TestSuite([*map(loader.loadTestsFromTestCase, cases[part::parts]), *promises])


def run(part, parts):
    """→ 有没有失败。"""
    suite = load_tests(unittest.defaultTestLoader, None, None, part, parts)
    return not unittest.TextTestRunner().run(suite).wasSuccessful()


def main():
    """多半的时间在等，所以三个进程各跑一份；给了名字的、没有 fork 的，一个进程。"""
    logger = logging.getLogger('easywechat')
    logger.addHandler(logging.StreamHandler(LOG))
    logger.propagate = False
    if len(sys.argv) > 1 or not hasattr(os, 'fork'):
        unittest.main()
    with contextlib.ExitStack() as stack:
        children = []
        for part in 1, 2:
            report = stack.enter_context(tempfile.TemporaryFile())
            child = os.fork()
            if not child:
                os.dup2(report.fileno(), 2)
                failed = run(part, 3)
                sys.stderr.flush()
                os._exit(failed)
            children.append((child, report))
        failed = run(0, 3)
        for child, report in children:
            failed |= bool(os.waitpid(child, 0)[1])
            report.seek(0)
            sys.stderr.write(report.read().decode(errors='replace'))
    sys.exit(failed)


if __name__ == '__main__':
    main()
