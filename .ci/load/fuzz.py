"""Random and mutated input by the million: fuzz.py COUNT, each for xml_to_dict, DecryptMsg, handle, the head and
config.ini, a tenth of it for long texts and mails.

Nothing but WeChatError's family may come out, and handle gives no 5xx. The slowest input is printed as CPU time.
Then the replays: 2,000 re-cut signatures and 1,000 messages three times; no callback runs twice.
"""
import io
import itertools
import logging
import os
import random
import sys
import tempfile
import time
import unittest
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

import easywechat  # noqa: E402
import test_easywechat  # noqa: E402
from easywechat import WeChatError, dict_to_xml  # noqa: E402

COUNT = int(sys.argv[1])
RNG = random.Random(1)
SERVER = easywechat.WeChatServer('fuzz', **easywechat._DEMO)
SERVER.register_callback('*', lambda msg: msg)
CRYPT = SERVER.wxcpt
TOKENS = [b'<', b'>', b'</', b'/>', b'<![CDATA[', b']]>', b'<!DOCTYPE', b'<?xml', b'&lt;', b'&#0;', b'&x;', b'\0',
          b'\xff', b'\xed\xa0\x80', b'Encrypt', b'{', b'[', b'"', b'\\u', b'%', b'&', b'=',
          b'+', b'\r\n', b' ', b'9' * 30]


def mutate(data):
    data = bytearray(data)
    for _ in range(RNG.randint(1, 3)):
        at, kind = RNG.randint(0, len(data)), RNG.random()
        if kind < .4:
            data[at:at + 1] = bytes([RNG.randrange(32, 127) if RNG.random() < .8 else RNG.getrandbits(8)])
        elif kind < .7:
            data[at:at] = RNG.choice(TOKENS) * RNG.choice([1, 1, 1, 50])
        elif kind < .9:
            del data[at:at + RNG.randint(1, 40)]
        else:
            data[at:at] = data[at:at + RNG.randint(1, 200)]
    return bytes(data)


def message(n):
    corpid = easywechat._DEMO['corpid']
    return dict_to_xml({'ToUserName': corpid, 'FromUserName': 'u', 'CreateTime': int(time.time()), 'MsgType': 'text',
                        'Content': '你好<%d' % n, 'MsgId': n, 'SelectedItems': {'SelectedItem': ['a', 'b']}})


def request(text):
    encrypt, now = CRYPT.seal(text), str(int(time.time()))
    nonce = str(RNG.randint(10 ** 8, 10 ** 9))
    return {'msg_signature': CRYPT.sign(now, nonce, encrypt), 'timestamp': now, 'nonce': nonce}, encrypt


def envelope(encrypt):
    return b'<xml><ToUserName><![CDATA[ww]]></ToUserName><Encrypt><![CDATA[' + encrypt + b']]></Encrypt></xml>'


MESSAGE = message(1).encode()
CONFIG = ('# 注释\n[demo]\ncorpid = ww1\nEncodingAESKey : "x" # y\n\ttoken=z\n[llm]\nprompt = 一\n  二\n').encode()
MAIL = max((data for data, _ in test_easywechat.MAILS.values()), key=len)
CASE = unittest.TestCase()


def fuzz_xml(n):
    easywechat.xml_to_dict(mutate(MESSAGE))


def fuzz_decrypt(n):
    """One time in two the signature is right, so that AES, padding, length and receive id see the mutations."""
    query, encrypt = request(message(n))
    if n % 2:
        raw = bytearray(easywechat.binascii.a2b_base64(encrypt))
        for _ in range(RNG.randint(1, 3)):
            raw[RNG.randrange(len(raw))] = RNG.getrandbits(8)
        encrypt = easywechat.binascii.b2a_base64(raw[:RNG.choice([len(raw), len(raw), RNG.randint(0, len(raw))])],
                                                 newline=False)
        if encrypt:
            query['msg_signature'] = CRYPT.sign(query['timestamp'], query['nonce'], encrypt)
        body = envelope(encrypt)
    else:
        body = mutate(envelope(encrypt) if n % 4 else b'{"encrypt": "' + encrypt + b'"}')
    code, text = CRYPT.DecryptMsg(body, query['msg_signature'], query['timestamp'], query['nonce'])
    assert code < 0 or text


def fuzz_handle(n):
    """Mutated query, mutated body, or a signed message whose inside is mutated."""
    text, which = message(n), n % 3
    if which == 0:
        text = mutate(text.encode())
    query, encrypt = request(text)
    target, body = '/weixin?' + urllib.parse.urlencode(query), envelope(encrypt)
    if which == 1:
        target = mutate(target.encode()).decode('latin-1')
    elif which == 2:
        body = mutate(body)
    status = SERVER.handle(RNG.choice(['POST', 'POST', 'POST', 'GET']), target, body)[0]
    assert status < 500, (status, target, body)


def fuzz_head(n, head=b'POST /weixin?nonce=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nAccept: */*\r\n'):
    method, target, fields = easywechat._parse_head(mutate(head))
    easywechat._body_length(fields, 1 << 20)


def fuzz_config(n):
    """A config.ini as somebody writes it, mutated: an error is one, and says no value."""
    try:
        easywechat._parse_ini(easywechat._text_of(mutate(CONFIG)), 'config.ini')
    except UnicodeError:
        pass


def fuzz_mail(n):
    lines = itertools.chain(io.BytesIO(mutate(mutate(mutate(MAIL)))), itertools.repeat(b''))
    with tempfile.TemporaryDirectory() as folder:
        assert easywechat._read_mail(lambda: next(lines), folder)[0].strip()


def fuzz_split(n):
    """Every part short, URLs, tags and emoji whole, code and tables complete, nothing lost."""
    test_easywechat.check_parts(CASE, test_easywechat.long_text(RNG), RNG.choice((1000, 2048, 4096)))


def run(fuzz, count=COUNT):
    refused, slowest, begin = 0, 0.0, time.process_time()
    for n in range(count):
        before = time.process_time()
        try:
            fuzz(n)
        except WeChatError:
            refused += 1
        slowest = max(slowest, time.process_time() - before)
    print('%-13s %d inputs, %d refused by an exception, slowest %.1f ms CPU, %.0f s CPU in all'
          % (fuzz.__name__, count, refused, slowest * 1000, time.process_time() - begin), flush=True)
    return slowest < 0.5


def replays():
    seen = []
    server = easywechat.WeChatServer('replay', **easywechat._DEMO)
    server.register_callback('*', lambda msg: seen.append(msg['MsgId']))
    verified = 0
    for n in range(2000):
        query, encrypt = request(message(n))
        stamp, nonce = query['timestamp'], query['nonce']
        for k in range(-3, 4):
            joined = stamp + nonce
            cut = dict(query, timestamp=joined[:10 + k], nonce=joined[10 + k:])
            verified += server.handle('POST', '/weixin?' + urllib.parse.urlencode(cut), envelope(encrypt))[0] == 200
        cut = dict(query, nonce=nonce + encrypt[:64].decode())
        assert server.handle('POST', '/weixin?' + urllib.parse.urlencode(cut), envelope(encrypt[64:]))[0] == 403
    for n in range(10 ** 6, 10 ** 6 + 1000):
        query, encrypt = request(message(n))
        for _ in range(3):
            assert server.handle('POST', '/weixin?' + urllib.parse.urlencode(query), envelope(encrypt))[0] == 200
    print('replays: 16,000 re-cut requests, %d verified; 1,000 messages three times; callbacks run: %d, twice: %d'
          % (verified, len(seen), len(seen) - len(set(seen))))
    return len(seen) == len(set(seen)) == 3000


if __name__ == '__main__':
    logging.getLogger('easywechat').setLevel(logging.CRITICAL)
    SERVER.max_skew = 0
    good = [run(fuzz) for fuzz in (fuzz_xml, fuzz_decrypt, fuzz_handle, fuzz_head, fuzz_config)] + [replays()]
    good += [run(fuzz_split, COUNT // 10), run(fuzz_mail, COUNT // 10)]
    print('fuzz: %d passed, %d failed' % (sum(good), len(good) - sum(good)))
    sys.exit(0 if all(good) else 1)
