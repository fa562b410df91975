#!/usr/bin/env python3
"""大模型聊天：任何 OpenAI 兼容的接口 (/chat/completions)，一边生成一边送到，也看图片。

    export OPENAI_API_KEY=sk-… OPENAI_MODEL=gpt-4o-mini
    python examples/simulator.py examples/llm_bot.py    # 没有企业微信的账号也能试
    python examples/llm_bot.py                          # 用自己的 config.ini；长的回答、图片要 secret 和 agentid

本机的 ollama 也行（先 ``ollama pull qwen2.5``）：OPENAI_BASE_URL=http://127.0.0.1:11434/v1，密钥随便写。
也可以写在 config.ini 里，没写的才看环境变量（在模拟器里要 ``simulator.py --with llm``）：

    [llm]
    api_key = sk-…
    base_url = https://api.openai.com/v1
    model = gpt-4o-mini
    tools = yes         # touser 里的人问起来，模型可以看这台机器的负载、内存、磁盘；模型要会用工具。不写就是 no

智能机器人里，回答是一个越来越长的气泡；应用里，写好一段送一段。每个人的对话分开记，只在内存里，图片看过就不留；30 分钟
不说话就忘，说「清除」马上忘。一个人一次一个问题：前一个还没答完，后一个会被请回去，免得一个人占满所有线程。
"""

import argparse
import base64
import collections
import itertools
import json
import mimetypes
import os
import re
import sys
import tempfile
import threading
import time

# 在自己的项目里，easywechat.py 就放在程序旁边，不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402
import nas_monitor  # noqa: E402

SYSTEM = '你在企业微信里和人聊天。用纯文本回答，不用 Markdown，能短就短。'
#: 模型可以用的工具，都没有参数：名字 →（给模型的说明，函数）。
TOOLS = {'machine_state': ('运行你的这台机器：开机多久，负载、内存、磁盘、温度、RAID', nas_monitor.report)}

logger = easywechat.logger


class Trouble(Exception):
    """没有（全部的）回答；``str()`` 是给用户的一句话。"""


# ---- 接口 --------------------------------------------------------------------------------------

class Endpoint:
    """一个 OpenAI 兼容的接口。"""

    #: 等下一个字、等一个回答最多多少秒；回答最多多少字；一问最多用几次工具。
    timeout, within, most, rounds = 120, 600, 20000, 3
    #: HTTP 状态 → 给用户的话；别的见 `_refused`。
    sentences = {401: '密钥不对：改 config.ini 里 [llm] 的 api_key，或环境变量 OPENAI_API_KEY，再重新启动',
                 403: '接口不让用：看账号和密钥的权限', 404: '没有这个接口或模型：看 [llm] 的 base_url 和 model',
                 429: '问得太快，或额度用完了：过一会儿再问'}
    #: finish_reason → 给用户的话。
    cut_short = {'length': '太长，没有说完：可以说「接着说」', 'content_filter': '后面的被接口拦下了：换个问法'}

    def __init__(self, key, base, model):
        self.model = model
        self._key = key
        self._url = base.rstrip('/') + '/chat/completions'

    def _trouble(self, sentence, what, detail=''):
        """→ `Trouble`，并写日志：有对方说的，没有密钥（有的接口会把它写在错误里）。"""
        logger.error('%s: %.300s', what, repr(detail).replace(self._key, '***'))
        return Trouble(sentence)

    def _refused(self, answer):
        sentence = self.sentences.get(answer.status) or (
            '接口出错了 (%d)：过一会儿再问' if answer.status >= 500 else
            '接口不收这个问题 (%d)：模型也许不会看图片、用工具，为什么在日志里') % answer.status
        return self._trouble(sentence, 'HTTP %d' % answer.status, b''.join(itertools.islice(answer, 20)))

    def _choices(self, answer):
        """SSE：一行 ``data: {…}`` 是一块，``data: [DONE]`` 是完了；别的行（注释、空行）不管。"""
        for line in answer:
            data = line[5:].strip() if line.startswith(b'data:') else b''
            if data == b'[DONE]':
                return
            event = easywechat.json_to_dict(data or b'{}')
            if event.get('error'):
                raise self._trouble('接口出错了：过一会儿再问', 'error in the stream', event['error'])
            yield from event.get('choices') or []
        raise self._trouble('回答没有完就断了：再问一次', 'the stream ended before it was done')

    def _ask(self, messages, tools, calls):
        """一个请求 → 回答的一块一块（生成器）；模型要用的工具放进 ``calls``。"""
        body = {'model': self.model, 'messages': messages, 'stream': True}
        if tools:
            body['tools'] = [{'type': 'function', 'function': {
                'name': name, 'description': tools[name][0], 'parameters': {'type': 'object', 'properties': {}}}}
                for name in tools]
        data = json.dumps(body).encode('ascii')
        headers = {'Authorization': 'Bearer ' + self._key, 'Content-Type': 'application/json'}
        with easywechat.fetch(self._url, data, headers, self.within, self.timeout) as answer:
            if answer.status != 200:        # 转到别处的也不跟：密钥会一起去
                raise self._refused(answer)
            for choice in self._choices(answer):
                delta, reason = choice['delta'], choice.get('finish_reason')
                for call in delta.get('tool_calls') or []:
                    if call['function'].get('name'):        # 后面的几块是参数：没有参数
                        calls.append({'id': call['id'], 'type': 'function', 'function': {
                            'name': call['function']['name'], 'arguments': '{}'}})
                yield delta.get('content') or ''
                if reason in self.cut_short:
                    raise self._trouble(self.cut_short[reason], 'cut short', reason)
                if reason:
                    return

    def _turns(self, messages, tools):
        """问；模型要用工具，就替它用，再问，最后一次不许再用。"""
        for left in range(self.rounds, -1, -1):
            calls = []
            yield from self._ask(messages, tools if left else {}, calls)
            if not calls:
                return
            messages = messages + [{'role': 'assistant', 'content': '', 'tool_calls': calls}] + [
                {'role': 'tool', 'tool_call_id': call['id'], 'content': tools[call['function']['name']][1]()}
                for call in calls]

    def stream(self, messages, tools):
        """对话 → 回答，一小块一小块的 str（生成器）；不成抛 `Trouble`，在它以前的都算数。"""
        left = self.most
        try:
            for delta in self._turns(messages, tools):
                yield delta
                left -= len(delta)
                if left < 0:
                    raise self._trouble('太长了，后面的不要了', 'more than %d' % self.most)
        except easywechat.NetworkError as e:
            slow = re.search('no answer within|timed out', e.errmsg)
            raise self._trouble('接口太久没有回答：再问一次' if slow else e.hint.replace('api_base', 'base_url'),
                                'no answer', e) from None
        except (ValueError, LookupError, AttributeError, TypeError) as e:
            raise self._trouble('接口答的看不懂：看 [llm] 的 base_url 对不对', 'not an answer', e) from None


# ---- 对话 --------------------------------------------------------------------------------------

class Chat:
    """所有人的对话；`answer` 是回调。"""

    #: 一个人记住最近的几问几答，一共最多多少字，多少秒不说话就忘。
    turns, characters, idle = 10, 8000, 30 * 60
    #: 最多记住多少个人，再多就忘最久没说话的。
    users = 1000

    _now = staticmethod(time.monotonic)

    def __init__(self, server, stream, system=SYSTEM, tools=None):
        self._server = server
        self._stream = stream       # 对话、工具 → 一小块一小块的回答
        self._system = {'role': 'system', 'content': system}
        self._tools = tools or {}
        self._trusted = set(server.settings['touser'].lower().split('|')) - {''}    # 可以用工具的
        self._talks = collections.OrderedDict()     # 谁 → {'at': 时刻，'messages': []}，最近的在后面
        self._busy = set()
        self._lock = threading.Lock()

    def _talk(self, user):
        """这个人的对话，还没忘的或新的。"""
        now = self._now()
        talk = self._talks.pop(user, {'at': now, 'messages': []})
        self._talks[user] = talk if now - talk['at'] <= self.idle else {'messages': []}
        self._talks[user]['at'] = now
        while len(self._talks) > self.users or now - next(iter(self._talks.values()))['at'] > self.idle:
            self._talks.popitem(last=False)
        return self._talks[user]

    def _remember(self, talk, question, answer):
        """记下一问一答，太长的回答截断；太多了就忘最早的，刚才的总留着。"""
        messages = talk['messages']
        messages += [{'role': 'user', 'content': question},
                     {'role': 'assistant', 'content': answer[:self.characters // 2]}]
        while len(messages) > 2 and (len(messages) > 2 * self.turns or
                                     sum(len(m['content']) for m in messages) > self.characters):
            del messages[:2]

    def _picture(self, part):
        """收到的一张图片 → 给模型的。"""
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = self._server.download(part, folder)
                url = 'data:%s;base64,%s' % (mimetypes.guess_type(path.name)[0] or 'image/jpeg',
                                             base64.b64encode(path.read_bytes()).decode())
        except (easywechat.WeChatError, ImportError, OSError, ValueError) as e:    # 没有 AES，磁盘满了
            logger.error('no picture: %s', e)
            raise Trouble('图片没有下载成：%s' % e) from None
        return {'type': 'image_url', 'image_url': {'url': url}}

    def _reply(self, talk, user, question, parts):
        """回答，一小块一小块的；断了，就在已经到了的后面说为什么。"""
        answer = trouble = ''
        try:
            content = [{'type': 'text', 'text': question}] + list(map(self._picture, parts)) if parts else question
            asked = [self._system] + talk['messages'] + [{'role': 'user', 'content': content}]
            for delta in self._stream(asked, self._tools if self._trusted & {user.lower(), '@all'} else {}):
                answer += delta
                yield delta
        except Trouble as e:
            trouble = '（%s）' % e
        if answer.strip():
            self._remember(talk, question, answer)
            yield '\n\n' + trouble if trouble else ''
        else:
            yield trouble or '（没有回答：再问一次）'

    def _alone(self, user, question, parts):
        """同 `_reply`，一个人一次一个。"""
        with self._lock:
            busy, talk = user in self._busy, self._talk(user)
            self._busy.add(user)
        if busy:
            yield '前一个问题还没答完，等它完了再问'
            return
        try:
            yield from self._reply(talk, user, question, parts)
        finally:
            with self._lock:
                self._busy.discard(user)

    def answer(self, msg):
        """回调：一句话、一张图片，智能机器人的语音、图文 → 一段会长的回答。"""
        user, text = msg['FromUserName'], msg.get('Content', '')
        parts = [part for part in msg.get('MsgItems', [msg]) if part.get('MsgType') == 'image']
        if re.fullmatch(r'\W*清除\W*', text):
            with self._lock:        # 正在答的那个问题，答完了也不会记下
                self._talks.pop(user, None)
            return '好，都忘了'
        if not text.strip() and not parts:
            return '只看得懂文字和图片'
        return easywechat.Stream(self._alone(user, text or '（一张图片）', parts))


# ---- 设置 --------------------------------------------------------------------------------------

def find_settings():
    """[llm] 和环境变量 OPENAI_… →（密钥，模型，地址，用不用工具）；缺了、不对的抛 `ConfigError`。"""
    section, values = easywechat.get_section('llm'), []
    for key, form, default in (('api_key', '[A-Za-z0-9_.+/=~:-]+', ''), ('model', '.+', ''),
                               ('base_url', 'https?://[!-~]+', 'https://api.openai.com/v1'), ('tools', 'yes|no', 'no')):
        name = 'OPENAI_' + key.upper()
        value = section.get(key) or os.environ.get(name, '').strip() or default
        if not re.fullmatch(form, value):
            raise easywechat.ConfigError('%s %s：照 llm_bot.py 开头的例子，写进 config.ini 的 [llm]，或环境变量 %s' % (
                key, '不对' if value else '没有写', name))
        values.append(value)
    return values


def register(server, chat):
    """登记回调。"""
    for kind in 'text', 'image', 'voice', 'video', 'location', 'link', 'file':      # 图文是 text
        server.register_callback(kind, chat.answer)


def main(argv=None):
    parser = argparse.ArgumentParser(description='大模型聊天：OpenAI 兼容的接口。')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    parser.add_argument('--system', default=SYSTEM, metavar='TEXT', help='系统提示：它是谁，怎么说话')
    args, server = parser.parse_args(argv), easywechat.WeChatServer('demo')
    key, model, base, tools = find_settings()
    register(server, Chat(server, Endpoint(key, base, model).stream, args.system, TOOLS if tools == 'yes' else {}))
    server.run(port=args.port)


if __name__ == '__main__':
    easywechat.command(main)
