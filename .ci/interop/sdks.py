"""Other people's SDKs as the bot of examples/simulator.py: sdks.py NODE_MODULES.

Each is a process of its own that connects to the simulator and answers what members say: text, a stream, a card and its
update, a welcome, a push, an upload, a download. A fourth speaks JSON callbacks with npm's @wecom/crypto.
sdks.py SDK URL BOT_ID SECRET is such a process; sdks.js the one for Node.
"""
import asyncio
import hashlib
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
CARD = {'card_type': 'button_interaction', 'main_title': {'title': '告警'}, 'task_id': 'T1',
        'button_list': [{'text': '确认', 'key': 'ok', 'style': 1}]}
DATA = bytes(range(256)) * 5079         # three chunks


# the bots

def official(url, bot_id, secret):
    import websockets
    from aibot import WSClient, WSClientOptions
    connect = websockets.connect        # it knows wss:// only and always gives a TLS context
    websockets.connect = lambda url, **options: connect(url, **dict(options, ssl=None))
    return WSClient(WSClientOptions(bot_id=bot_id, secret=secret, ws_url=url))


def community(url, bot_id, secret):
    from wecom_aibot_sdk import WSClient
    return WSClient(bot_id, secret, ws_url=url)


async def answer(client, frame):
    """What a member said is what is done."""
    body = frame['body']
    user, kind = body.get('chatid') or body['from']['userid'], body['msgtype']
    text = body.get('text', {}).get('content', '')
    if kind == 'file':
        got = await client.download_file(body['file']['url'], body['file']['aeskey'])
        data, name = got if isinstance(got, tuple) else (got['buffer'], got['filename'])
        await client.reply_stream(frame, 's', '%s %s' % (name, hashlib.sha1(data).hexdigest()), True)
    elif '流' in text:
        for n in range(1, 4):
            await client.reply_stream(frame, 's', '一二三'[:n], n == 3, None, {'id': 'F1'} if n == 1 else None)
    elif '卡' in text:
        await client.reply_template_card(frame, CARD)
    elif '推' in text:
        await client.send_message(user, {'msgtype': 'markdown', 'markdown': {'content': '**推**'}})
    elif '传' in text:
        media = await client.upload_media(DATA, type='file', filename='报告.bin')
        await client.reply_media(frame, 'file', media['media_id'])
    else:
        await client.reply_stream(frame, 's', '听到 ' + (text or body.get('voice', {}).get('content', kind)), True)


async def bot(make, args):
    client = make(*args)

    async def told(frame):
        await answer(client, frame)

    async def entered(frame):
        await client.reply_welcome(frame, {'msgtype': 'text', 'text': {'content': '您好'}})

    async def pressed(frame):
        card = dict(CARD, main_title={'title': '已确认'})
        await client.update_template_card(frame, card, [frame['body']['from']['userid']])
    for name, handler in (('message', told), ('event.enter_chat', entered), ('event.template_card_event', pressed)):
        client.on(name, handler)
    await client.connect()
    await asyncio.Event().wait()


# the members

def last(bot, kind, text, how='reply'):
    """Wait for this bubble, finished."""
    asked = {'kind': kind, 'text': text, 'how': how, 'finished': True}
    return bot.wait(lambda bot: [b for b in bot.bubbles[-1:] if dict(b, **asked) == b])[0]


def checks(wecom, uploads):
    """Each is a sentence; whatever does not come raises."""
    bot = wecom.bot
    bot.enter('zhangsan')
    last(bot, 'text', '您好', 'welcome')
    yield 'a welcome'
    bot.say('zhangsan', '你好')
    last(bot, 'stream', '听到 你好')
    bot.say('lisi', '你好', chat='group', quote='昨天')
    assert last(bot, 'stream', '听到 @小助手 你好')['chat'] == bot.group
    bot.say('zhangsan', voice='说的话')
    last(bot, 'stream', '听到 说的话')
    yield 'a text, in a group too, a voice'
    bot.say('zhangsan', '流')
    assert last(bot, 'stream', '一二三')['frames'] == 3
    assert bot.bubbles[-1]['feedback'] == 'F1'
    yield 'a stream of three frames with a feedback.id'
    bot.say('zhangsan', '卡')
    card = last(bot, 'template_card', '告警')
    bot.press(card, 'ok')
    last(bot, 'template_card', '已确认')
    yield 'a card and its update'
    bot.say('zhangsan', '推')
    last(bot, 'markdown', '**推**', 'push')
    yield 'a push'
    if uploads:
        bot.say('zhangsan', '传')
        media_id = last(bot, 'file', '报告.bin')['body']['media_id']
        assert wecom.media[media_id]['data'] == DATA
        yield 'an upload in three chunks'
    for n in range(2):                  # an aeskey with its padding and one without
        bot.say('zhangsan', file=('照片 %d.bin' % n, DATA[n:]))
        last(bot, 'stream', '照片 %d.bin %s' % (n, hashlib.sha1(DATA[n:]).hexdigest()))
    yield 'downloads'
    assert not bot.problems, bot.problems


def json_checks(wecom):
    bot = wecom.bot
    bot.poll_every = 0.05
    bot.enter('zhangsan')
    last(bot, 'text', '您好', 'welcome')
    yield 'a welcome'
    bot.say('zhangsan', '流')
    stream = last(bot, 'stream', '一二三')
    assert stream['frames'] == 3
    yield 'a stream that is asked for twice'
    bot.say('lisi', '图', chat='group')
    assert len(last(bot, 'stream', '看')['images']) == 1
    yield 'a picture in the last frame'
    bot.say('zhangsan', '卡')
    card = last(bot, 'template_card', '告警')
    bot.press(card, 'ok')
    last(bot, 'template_card', '已确认')
    yield 'a card and its update'
    bot.say('zhangsan', '晚')
    last(bot, 'markdown', '晚了', 'response')
    yield 'a response_url, once'
    bot.say('zhangsan', file=('照片.bin', DATA))
    last(bot, 'stream', hashlib.sha1(DATA).hexdigest())
    yield 'a download under EncodingAESKey'
    bot.feedback(stream, 2, '不准', [2])
    bot.say('zhangsan', '评')
    last(bot, 'stream', 'F1 2')
    yield 'a feedback_event'
    assert not bot.problems, bot.problems


def run(name, command, node_modules, uploads=True):
    """One SDK → how many checks passed."""
    import simulator
    wecom, passed = simulator.WeCom(), 0
    wecom.start()
    settings = wecom.bot_settings if name != 'json' else wecom.settings
    keys = ('bot_url', 'bot_id', 'bot_secret') if name != 'json' else ('token', 'encoding_aes_key')
    process = subprocess.Popen(command + [name] + [settings[key] for key in keys], stdout=subprocess.PIPE,
                               env=dict(os.environ, NODE_PATH=node_modules))
    try:
        if name == 'json':
            wecom.bot.mode = 'json'
            problem = wecom.bot.verify(process.stdout.readline().decode().strip())
            assert not problem, problem
        else:
            wecom.bot.wait(lambda bot: bot.connected, 20)
        for _ in json_checks(wecom) if name == 'json' else checks(wecom, uploads):
            passed += 1
        return passed
    except AssertionError:
        for frame in wecom.bot.frames[-6:]:
            print(frame)
        raise
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        wecom.stop()


def main(node_modules):
    sys.path[:0] = [os.path.join(HERE, os.pardir, os.pardir), os.path.join(HERE, os.pardir, os.pardir, 'examples')]
    python, node = [sys.executable, os.path.abspath(__file__)], ['node', os.path.join(HERE, 'sdks.js')]
    passed = [run('official', python, node_modules, uploads=False), run('community', python, node_modules),
              run('node', node, node_modules), run('json', node, node_modules)]
    print('SDKs of 智能机器人: %s passed (official Python, community Python, official Node, JSON with @wecom/crypto)'
          % ' + '.join(map(str, passed)))


if __name__ == '__main__':
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        asyncio.run(bot({'official': official, 'community': community}[sys.argv[1]], sys.argv[2:]))
