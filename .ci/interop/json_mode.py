"""Other people's crypto plays WeCom against a running bot in JSON mode: json_mode.py PYTHON NODE_MODULES.

PYTHON (with pycryptodome) runs the bot, an app with the same Token and key beside it; first wechatpy talks to it, then
npm's @wecom/crypto (json_mode.js). json_mode.py serve is the bot.
"""
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, os.pardir))

TOKEN, KEY, CORP, BOT = 'JsonBotToken', 'EasyWeChatJsonKeyIsPublicDoNotUseItAnywhere', 'wwinterop', 'aibInterop'
CARD = {'card_type': 'text_notice', 'main_title': {'title': '已确认'}, 'task_id': 'T1'}


# the bot

def serve():
    import easywechat

    class Bot(easywechat.WeChatServer):
        answer_within, hold_within = 0.3, 0.5
    server = Bot('json', corpid=CORP, token=TOKEN, encoding_aes_key=KEY, bot_id=BOT, secret='', agentid='')

    @server.register_callback('text')
    def text(msg):
        if not msg['Content'].startswith('慢'):
            return msg['Content']
        return easywechat.Stream(word for word in msg['Content'] if not time.sleep(0.1))

    @server.register_callback('event')
    def event(msg):
        return {'enter_chat': '您好', 'template_card_event': {'response_type': 'update_template_card',
                                                            'template_card': CARD}}.get(msg['Event'])
    print(server.start('127.0.0.1', 0)[1], flush=True)
    sys.stdin.read()
    server.stop()


# wechatpy as WeCom

class WeCom:
    def __init__(self, port):
        from wechatpy.crypto import _get_signature
        from wechatpy.enterprise.crypto import PrpCrypto, WeChatCrypto
        self.url, self.sign, self.prp = 'http://127.0.0.1:%d/weixin?' % port, _get_signature, PrpCrypto
        self.key = WeChatCrypto(TOKEN, KEY, '').key
        self.passed = self.failed = 0

    def check(self, good, what):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        if not good:
            print('wechatpy, JSON: wrong:', what)

    def ask(self, text, receive_id='', get=False):
        """They seal, we answer, they open: the text that comes back; a refusal is its status."""
        sealed = self.prp(self.key).encrypt(text, receive_id).decode()
        nonce, now = str(random.getrandbits(31)), str(int(time.time()))
        query = {'msg_signature': self.sign(TOKEN, now, nonce, sealed), 'timestamp': now, 'nonce': nonce}
        if get:
            query['echostr'] = sealed
        body = None if get else json.dumps({'encrypt': sealed}).encode()
        try:
            with urllib.request.urlopen(self.url + urllib.parse.urlencode(query), body, timeout=5) as answer:
                data = answer.read().decode()
        except urllib.error.HTTPError as e:
            with contextlib.closing(e):
                return e.code
        if get or not data:
            return data
        envelope = json.loads(data)
        self.check(envelope['msgsignature'] == self.sign(TOKEN, str(envelope['timestamp']), nonce, envelope['encrypt'])
                   and (envelope['timestamp'], envelope['nonce']) == (int(now), nonce), 'the envelope %s' % data)
        return self.prp(self.key).decrypt(envelope['encrypt'], '')

    def message(self, msgtype, **fields):
        msg = {'msgid': 'M%d' % random.getrandbits(60), 'aibotid': BOT, 'chattype': 'single',
               'from': {'userid': 'li.lei'}, 'response_url': self.url, 'msgtype': msgtype}
        return dict(msg, **fields)

    def say(self, text, **fields):
        return json.loads(self.ask(json.dumps(self.message('text', text={'content': text}, **fields))))

    def event(self, kind, **data):
        return json.loads(self.ask(json.dumps(self.message('event', create_time=int(time.time()), event={
            'eventtype': kind, kind: data}))))

    def talk(self):
        for n in range(100):
            echo = str(random.getrandbits(62))
            self.check(self.ask(echo, get=True) == echo, 'the verification')
            text = ''.join(random.choice('a 中<>&"\\😀]07') for _ in range(n % 97 + 1)).strip() or 'x'
            frame = self.say(text)['stream']
            self.check((frame['content'], frame['finish']) == (text, True), frame)
        msg, seen = self.message('text', text={'content': '慢慢地说完一句话'}), []
        frame = json.loads(self.ask(json.dumps(msg)))['stream']
        again = json.loads(self.ask(json.dumps(msg)))['stream']         # delivered again
        self.check(not frame['finish'] and again['id'] == frame['id'], frame)
        stream = frame
        while not stream['finish'] and len(seen) < 100:
            time.sleep(0.05)
            stream = json.loads(self.ask(json.dumps(self.message('stream', stream={'id': frame['id']}))))['stream']
            seen.append(stream['content'])
        self.check(seen[-1] == '慢慢地说完一句话' and len(set(seen)) > 2, seen)
        self.check(self.event('enter_chat') == {'msgtype': 'text', 'text': {'content': '您好'}}, 'enter_chat')
        update = {'response_type': 'update_template_card', 'template_card': CARD}
        press = dict(card_type='button_interaction', event_key='ok', task_id='T1')
        self.check(self.event('template_card_event', **press) == update, 'template_card_event')
        self.check(self.event('feedback_event', id='F1', type=1) == {}, 'feedback_event')
        unknown = json.loads(self.ask(json.dumps(self.message('stream', stream={'id': 'nosuch'}))))['stream']
        self.check(unknown['finish'] and unknown['content'].strip(), unknown)
        app = json.dumps({'ToUserName': CORP, 'FromUserName': 'sys', 'MsgType': 'event', 'Event': 'x'})
        self.check(self.ask(app, CORP) == '', "an app's JSON event")
        for text, receive_id in ((json.dumps(self.message('text')), 'wwother'),
                                 ('<xml><MsgType>text</MsgType></xml>', ''),
                                 (json.dumps(self.message('text', aibotid='aibOther')), ''),
                                 (json.dumps({k: v for k, v in msg.items() if k != 'from'}), '')):
            self.check(self.ask(text, receive_id) == 403, text)
        print('wechatpy, JSON: %d passed, %d failed' % (self.passed, self.failed),
              flush=True)
        return self.failed


def main(python, modules):
    with tempfile.TemporaryFile() as log:
        bot = subprocess.Popen([python, os.path.abspath(__file__), 'serve'], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=log)
        failed = True
        try:
            port = int(bot.stdout.readline())
            failed = WeCom(port).talk()
            failed |= subprocess.call(['node', os.path.join(HERE, 'json_mode.js'), str(port), TOKEN, KEY, BOT],
                                      env=dict(os.environ, NODE_PATH=modules))
        finally:
            bot.communicate(timeout=10)
            if failed or bot.returncode:
                log.seek(0)
                print(log.read().decode(errors='replace'), file=sys.stderr)
    return int(bool(failed or bot.returncode))


if __name__ == '__main__':
    sys.exit(serve() if sys.argv[1:] == ['serve'] else main(*sys.argv[1:]))
