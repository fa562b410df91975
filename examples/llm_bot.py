#!/usr/bin/env python3
"""大模型聊天:任何 OpenAI 兼容的接口 (/chat/completions),一边生成一边送到。

    export OPENAI_API_KEY=sk-… OPENAI_MODEL=gpt-4o-mini
    python examples/simulator.py examples/llm_bot.py    # 没有企业微信的账号,在本机的里试
    python examples/llm_bot.py                          # 用 config.ini 的 [demo],长的回答要 secret

什么账号都没有,也可以接本机的 ollama(先 ``ollama pull qwen2.5``)::

    export OPENAI_BASE_URL=http://127.0.0.1:11434/v1 OPENAI_API_KEY=ollama OPENAI_MODEL=qwen2.5

也可以写在 config.ini 里,没写的才看环境变量(在模拟器里要 ``simulator.py --with llm``)::

    [llm]
    api_key = sk-…
    base_url = https://api.openai.com/v1
    model = gpt-4o-mini

短的回答是一条消息;长的够一段就先送一段。每个人的对话分开记,只在内存里,30 分钟不说话就忘,说「清除」马上忘。
一个人一次一个问题:前一个还没答完,后一个会被请回去,不排队,免得一个人占满所有线程。
"""

import argparse
import collections
import itertools
import json
import os
import re
import sys
import threading
import time

# 在自己的项目里,easywechat.py 就放在程序旁边,不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402

SYSTEM = '你在企业微信里和人聊天。用纯文本回答,不用 Markdown,能短就短。'
#: 一段至少几个字才先送出去;到这么多字还没有空行,就断在行或句子之间 (一条消息是 2048 字节)。
ENOUGH, PLENTY = 200, 600

logger = easywechat.logger


class Trouble(Exception):
    """没有(全部的)回答;``str()`` 是给用户的一句话。"""


# ---- 接口 --------------------------------------------------------------------------------------

class Endpoint:
    """一个 OpenAI 兼容的接口。"""

    #: 等下一个字、等整个回答最多多少秒;回答最多多少字。
    timeout, within, most = 120, 600, 20000
    #: HTTP 状态 → 给用户的话;别的 4xx、5xx 见 `_refused`。
    sentences = {401: '接口不认这个密钥', 403: '接口不让用', 404: '没有这个接口或模型',
                 429: '问得太快,或额度用完了'}
    #: finish_reason → 给用户的话。
    cut_short = {'length': '太长,没有说完', 'content_filter': '后面的被接口拦下了'}

    def __init__(self, key, base, model):
        self.model = model
        self._key = key
        self._url = base.rstrip('/') + '/chat/completions'

    def _trouble(self, sentence, what, detail=''):
        """→ `Trouble`,并写日志:有对方说的,没有密钥(有的接口会把它写在错误里)。"""
        logger.error('%s: %.300s', what, repr(detail).replace(self._key, '***'))
        return Trouble(sentence)

    def _refused(self, answer):
        sentence = self.sentences.get(answer.status, '接口出错了' if answer.status >= 500 else '接口不收这个问题')
        return self._trouble('%s (%d):过一会儿再试,或告诉管理员' % (sentence, answer.status),
                             'HTTP %d' % answer.status, b''.join(itertools.islice(answer, 20)))

    def _events(self, answer):
        """SSE:一行 ``data: {…}`` 是一块,``data: [DONE]`` 是完了;别的行(注释、空行)不管。"""
        for line in answer:
            data = line[5:].strip() if line.startswith(b'data:') else b''
            if data == b'[DONE]':
                return
            if data:
                yield easywechat.json_to_dict(data)
        raise self._trouble('回答没有完就断了', 'the stream ended before it was done')

    def _deltas(self, messages):
        body = json.dumps({'model': self.model, 'messages': messages, 'stream': True})
        headers = {'Authorization': 'Bearer ' + self._key, 'Content-Type': 'application/json'}
        with easywechat.fetch(self._url, body.encode('ascii'), headers, self.within, self.timeout) as answer:
            if answer.status != 200:        # 转到别处的也不跟：密钥会一起去
                raise self._refused(answer)
            for event in self._events(answer):
                if event.get('error'):
                    raise self._trouble('接口出错了', 'error in the stream', event['error'])
                for choice in event.get('choices') or []:
                    yield choice['delta'].get('content') or ''
                    if choice.get('finish_reason') in self.cut_short:
                        raise self._trouble(self.cut_short[choice['finish_reason']], 'cut short',
                                            choice['finish_reason'])
                    if choice.get('finish_reason'):
                        return

    def stream(self, messages):
        """对话 → 回答,一小块一小块的 str (生成器);不成抛 `Trouble`,在它以前的都算数。"""
        left = self.most
        try:
            for delta in self._deltas(messages):
                yield delta
                left -= len(delta)
                if left < 0:
                    raise self._trouble('太长了,后面的不要了', 'more than %d' % self.most)
        except easywechat.NetworkError as e:
            slow = re.search('no answer within|timed out', e.errmsg)
            raise self._trouble('接口太久没有回答' if slow else '和接口的连接断了', 'no answer', e) from None
        except (ValueError, LookupError, AttributeError, TypeError) as e:
            raise self._trouble('接口答的看不懂', 'not an answer', e) from None


# ---- 对话 --------------------------------------------------------------------------------------

def cut(text):
    """``text`` 的前多少个字可以先送出去;还不够是 0。不在 ``` 的代码中间断开。"""
    for border in ('\n\n', '\n', '。', ' ') if len(text) > PLENTY else ('\n\n',):
        end = text.rfind(border, ENOUGH) + len(border)
        if end >= len(border) and text.count('```', 0, end) % 2 == 0:
            return end
    return 0


class Chat:
    """所有人的对话;`answer` 是回调。"""

    #: 一个人记住最近的几问几答,一共最多多少字,多少秒不说话就忘。
    turns, characters, idle = 10, 8000, 30 * 60
    #: 最多记住多少个人,再多就忘最久没说话的。
    users = 1000

    _now = staticmethod(time.monotonic)

    def __init__(self, stream, system=SYSTEM):
        self._stream = stream       # 对话 → 一小块一小块的回答
        self._system = {'role': 'system', 'content': system}
        self._talks = collections.OrderedDict()     # 谁 → {'at': 时刻, 'messages': []},最近的在后面
        self._busy = set()
        self._lock = threading.Lock()

    def _talk(self, user):
        """这个人的对话,还没忘的或新的。"""
        now = self._now()
        talk = self._talks.pop(user, {'at': now, 'messages': []})
        self._talks[user] = talk if now - talk['at'] <= self.idle else {'messages': []}
        self._talks[user]['at'] = now
        while len(self._talks) > self.users or \
                now - next(iter(self._talks.values()))['at'] > self.idle:
            self._talks.popitem(last=False)
        return self._talks[user]

    def _remember(self, talk, question, answer):
        """记下一问一答,太长的回答截断;太多了就忘最早的,刚才的总留着。"""
        messages = talk['messages']
        messages += [{'role': 'user', 'content': question},
                     {'role': 'assistant', 'content': answer[:self.characters // 2]}]
        while len(messages) > 2 and (
                len(messages) > 2 * self.turns or
                sum(len(m['content']) for m in messages) > self.characters):
            del messages[:2]

    def _reply(self, talk, question):
        """回答,够一段就给出一段;断了就给出已经到了的,再说为什么。"""
        asked = [self._system] + talk['messages'] + [{'role': 'user', 'content': question}]
        answer = waiting = trouble = ''
        try:
            for delta in self._stream(asked):
                answer += delta
                waiting += delta
                end = cut(waiting)
                if end:
                    yield waiting[:end].strip('\n')
                    waiting = waiting[end:]
        except Trouble as e:
            trouble = '(%s)' % e
        if answer.strip():
            self._remember(talk, question, answer)
        else:
            trouble = trouble or '(没有回答)'
        yield '\n\n'.join(filter(None, (waiting.strip('\n'), trouble)))

    def answer(self, msg):
        """回调:一句话 → 回答,一段一段的 (生成器)。"""
        user = msg['FromUserName']
        with self._lock:
            busy = user in self._busy
            self._busy.add(user)
            talk = self._talk(user)
        if busy:
            yield '前一个问题还没答完,等它完了再问'
            return
        try:
            yield from self._reply(talk, msg['Content'])
        finally:
            with self._lock:
                self._busy.discard(user)

    def forget(self, msg):
        """回调:忘了这个人;正在答的那个问题,答完了也不会记下。"""
        with self._lock:
            self._talks.pop(msg['FromUserName'], None)
        return '好,都忘了'


def register(server, chat):
    """登记回调。"""
    server.register_callback('text', chat.answer)
    server.register_callback('text', chat.forget, pattern=r'\s*清除\s*')
    for kind in 'image', 'voice', 'video', 'location', 'link', 'file':
        server.register_callback(kind, lambda msg: '只看得懂文字')


# ---- 设置 --------------------------------------------------------------------------------------

def find_endpoint():
    """[llm] 和环境变量 → `Endpoint`;缺了、不对的抛 `ConfigError`。"""
    section, values = easywechat.get_section('llm'), []
    for key, form, default in (('api_key', '[A-Za-z0-9_.+/=~:-]+', ''),
                               ('base_url', 'https?://[!-~]+', 'https://api.openai.com/v1'),
                               ('model', '.+', '')):
        name = 'OPENAI_' + key.upper()
        value = section.get(key) or os.environ.get(name, '').strip() or default
        if not re.fullmatch(form, value):
            raise easywechat.ConfigError('%s is %s: set it, or %s in [llm] of config.ini' % (
                name, 'not as it should be' if value else 'missing', key))
        values.append(value)
    return Endpoint(*values)


def main(argv=None):
    parser = argparse.ArgumentParser(description='大模型聊天:OpenAI 兼容的接口。')
    parser.add_argument('--port', type=int, default=8000, help='端口(默认 8000)')
    parser.add_argument('--system', default=SYSTEM, metavar='TEXT', help='系统提示:它是谁,怎么说话')
    args = parser.parse_args(argv)
    try:
        server = easywechat.WeChatServer('demo')
        register(server, Chat(find_endpoint().stream, args.system))
        server.run(port=args.port)
        return 0
    except OSError as e:
        code, text = 3, 'cannot listen on 0.0.0.0 port %d: %s; --port takes another' % (
            args.port, e.strerror)
    except (easywechat.WeChatError, ImportError, OverflowError) as e:
        code, text = 2, getattr(e, 'errmsg', e)
    print('llm_bot: %s' % text, file=sys.stderr)
    return code


if __name__ == '__main__':
    if sys.stdout:          # 显示不了中文的终端得到转义
        sys.stdout = open(sys.stdout.fileno(), 'w', encoding=sys.stdout.encoding,
                          errors='backslashreplace', buffering=1, closefd=False)
    sys.exit(main())
