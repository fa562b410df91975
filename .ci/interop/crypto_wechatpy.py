"""wechatpy plays WeCom against a running --echo: crypto_wechatpy.py PORT."""
import os
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

from wechatpy.enterprise.crypto import WeChatCrypto  # noqa: E402
from wechatpy.enterprise.parser import parse_message  # noqa: E402

from easywechat import _DEMO, WXBizMsgCrypt, dict_to_xml  # noqa: E402

URL = 'http://127.0.0.1:%s/weixin?' % sys.argv[1]
THEIRS = WeChatCrypto(_DEMO['token'], _DEMO['encoding_aes_key'], _DEMO['corpid'])
OURS = WXBizMsgCrypt(_DEMO['token'], _DEMO['encoding_aes_key'], _DEMO['corpid'])


def field(xml, name):
    """The CDATA of one element of an envelope."""
    return xml.partition('<%s>' % name)[2].partition('</%s>' % name)[0] \
        .replace('<![CDATA[', '').replace(']]>', '')


def ask(query, body=None):
    with urllib.request.urlopen(URL + urllib.parse.urlencode(query), body, timeout=5) as answer:
        return answer.read().decode()


def exchange(text):
    """They seal, we answer, they open: the text that comes back."""
    nonce, now = str(random.randint(1, 10 ** 9)), str(int(time.time()))
    message = dict_to_xml({'ToUserName': _DEMO['corpid'], 'FromUserName': 'wechatpy', 'CreateTime': int(now),
                           'MsgType': 'text', 'Content': text, 'MsgId': random.getrandbits(62)})
    envelope = THEIRS.encrypt_message(message, nonce, now)
    answer = ask({'msg_signature': field(envelope, 'MsgSignature'), 'timestamp': now, 'nonce': nonce},
                 dict_to_xml({'Encrypt': field(envelope, 'Encrypt')}).encode())
    reply = THEIRS.decrypt_message(answer, field(answer, 'MsgSignature'), field(answer, 'TimeStamp'),
                                   field(answer, 'Nonce'))
    return parse_message(reply).content


def main():
    differences = 0
    for n in range(300):
        text = ''.join(random.choice('a 中<>&😀]07') for _ in range(n % 97 + 1)).strip() or 'x'
        differences += exchange(text) != text
        theirs = THEIRS.encrypt_message(text, '1', '1700000000')
        query = [field(theirs, name) for name in ('MsgSignature', 'TimeStamp', 'Nonce', 'Encrypt')]
        differences += OURS.DecryptMsg(theirs, *query[:3]) != (0, text)
        ours = OURS.EncryptMsg(text, '1')[1]
        differences += THEIRS.decrypt_message(ours, field(ours, 'MsgSignature'), field(ours, 'TimeStamp'),
                                              field(ours, 'Nonce')) not in (text, text.encode())
    print('wechatpy: %d passed, %d failed' % (900 - differences, differences))
    return 1 if differences else 0


if __name__ == '__main__':
    sys.exit(main())
