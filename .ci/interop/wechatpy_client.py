"""wechatpy's client against examples/simulator.py: it sends, uploads, downloads, reads a user, creates a menu."""
import io
import os
import sys
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir, 'examples'))

import requests  # noqa: E402

import simulator  # noqa: E402

warnings.simplefilter('ignore')     # its own, about its next release
try:
    from wechatpy.work import WeChatClient
except ImportError:                 # up to 1.8
    from wechatpy.enterprise import WeChatClient
from wechatpy.exceptions import WeChatClientException  # noqa: E402

WECOM = simulator.WeCom()
AGENT = int(WECOM.settings['agentid'])
MENU = {'button': [{'type': 'click', 'name': '状态', 'key': 's'},
                   {'name': '更多', 'sub_button': [{'type': 'view', 'name': '面板', 'url': 'https://e.x/'}]}]}


def to_the_simulator():
    """Every address of WeCom that it writes, some of them in full, becomes the simulator's."""
    WECOM.start()
    request = requests.Session.request

    def redirected(session, method, url, **kwargs):
        return request(session, method, url.replace('https://qyapi.weixin.qq.com', WECOM.url), **kwargs)
    requests.Session.request = redirected


def errcode(call, *args, **kwargs):
    """The code of a refusal, 0 if there was none."""
    try:
        call(*args, **kwargs)
        return 0
    except WeChatClientException as e:
        return e.errcode


def checks(client):
    """Each → (what, what it should have been)."""
    png = io.BytesIO(b'\x89PNG\r\n\x1a\n' + bytes(range(256)))
    png.name = '照片.png'
    yield client.message.send_text(AGENT, ['zhangsan', 'lisi'], '你好')['errmsg'], 'ok'
    yield WECOM.messages[-1]['text']['content'], '你好'
    yield [len(WECOM.inbox[user]) for user in ('zhangsan', 'lisi', 'wangwu')], [1, 1, 0]
    media_id = client.media.upload('image', png)['media_id']
    yield WECOM.media[media_id]['name'], '照片.png'
    yield client.media.download(media_id).content, png.getvalue()
    png.seek(0)
    yield requests.get(client.media.upload_img(png)['url']).content, png.getvalue()
    yield client.message.send_image(AGENT, 'zhangsan', media_id)['errcode'], 0
    yield client.message.send_text_card(AGENT, 'zhangsan', '备份', '失败', 'https://e.x/')['errcode'], 0
    yield client.user.get('lisi')['name'], '李四'
    yield sorted(u['userid'] for u in client.user.list(1, simple=True)), ['lisi', 'wangwu', 'zhangsan']
    yield client.agent.get(AGENT)['agentid'], AGENT
    yield client.menu.create(AGENT, MENU)['errcode'], 0
    yield client.menu.get(AGENT)['button'], MENU['button']
    yield client.menu.delete(AGENT)['errcode'], 0
    yield errcode(client.menu.get, AGENT), 46003
    WECOM.expire_tokens()
    yield client.message.send_text(AGENT, '@all', 'a fresh token')['errcode'], 0
    yield errcode(client.message.send_text, AGENT, 'nobody', 'x'), 81013
    yield errcode(client.message.send_text, AGENT + 1, 'zhangsan', 'x'), 301002
    yield errcode(client.message.send_image, AGENT, 'zhangsan', 'nosuch'), 40007
    yield errcode(client.user.get, 'nobody'), 60111
    WECOM.trusted = False
    yield errcode(client.user.get, 'lisi'), 60020


def main():
    to_the_simulator()
    passed = failed = 0
    for got, expected in checks(WeChatClient(WECOM.settings['corpid'], WECOM.settings['secret'])):
        good = got == expected
        passed, failed = passed + good, failed + (not good)
        if not good:
            print('got %r, expected %r' % (got, expected))
    print("wechatpy's client: %d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
