#!/usr/bin/env python3
"""第一个机器人：回同一句话，数着是第几句；对它说「菜单」「按钮」「文件」，发图片、位置，也有回答。

    python examples/simulator.py examples/demo.py       # 没有账号，在本机的聊天页里试
    python examples/demo.py --port 8001                 # 用自己的 config.ini；不写就是 8000 端口
"""

import argparse
import os
import pathlib
import sys

# 在自己的项目里，easywechat.py 就放在程序旁边，不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402

MENU = {'button': [{'type': 'click', 'name': name, 'key': name} for name in ('吃什么', '去哪里')]}


def reply_func(param_dict):
    """图片、语音、视频、文件：原样返回，就是发回去。"""
    return param_dict


class Counter:
    """一个记得住事情的对象：每个人说过几句话。"""

    def __init__(self):
        self.counts = {}

    def reply(self, msg):
        """文字：回同一句话，加上这是第几句。"""
        user = msg['FromUserName']
        self.counts[user] = self.counts.get(user, 0) + 1
        return '%s（第 %d 句）' % (msg['Content'], self.counts[user])


def card(title, task_id):
    """有两个按钮的卡片；每张的 task_id 都不同。"""
    return {'card_type': 'button_interaction', 'main_title': {'title': title}, 'task_id': task_id,
            'button_list': [{'text': '米饭', 'key': '米饭'}, {'text': '面条', 'key': '面条'}]}


def register(server):
    """什么消息，由谁来答。"""
    server.register_callback('text', Counter().reply)
    for msg_type in 'image', 'voice', 'video', 'file':
        server.register_callback(msg_type, reply_func)
    server.register_callback('location', lambda msg: '你在%s（%s，%s）' % (
        msg['Label'], msg['Location_X'], msg['Location_Y']))
    server.register_callback('event:click', lambda msg: '你点了菜单里的「%s」' % msg['EventKey'])
    if not server.settings['secret'] and not server.settings['bot_id']:
        server.register_callback('text', lambda msg: '这要主动发送：先在 config.ini 里写上 secret 和 agentid',
                                 pattern='菜单|按钮|文件')
    server.register_callback('text', lambda msg: pathlib.Path(__file__), pattern='文件')

    @server.register_callback('text', pattern='菜单')
    def menu(msg):
        if 'aibotid' in msg:
            return '智能机器人没有菜单，说「按钮」试试'
        try:
            server.client.call('menu/create', MENU, agentid=server.settings['agentid'])
            return '菜单建好了，点一下试试'
        except easywechat.WeChatError as e:
            return '菜单没有建成：%s' % e

    @server.register_callback('text', pattern='按钮')
    def buttons(msg):
        return {'msgtype': 'template_card', 'template_card': card('今天吃什么？', os.urandom(8).hex())}

    @server.register_callback('event:template_card_event')
    def pressed(msg):
        return {'response_type': 'update_template_card',
                'template_card': card('今天吃%s' % msg['EventKey'], msg['TaskId'])}


def main(argv=None):
    parser = argparse.ArgumentParser(description='第一个机器人：回同一句话，还有菜单、按钮、文件。')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    args = parser.parse_args(argv)
    server = easywechat.WeChatServer('demo')
    register(server)
    server.run(host='0.0.0.0', port=args.port, debug=False)


if __name__ == '__main__':
    easywechat.command(main)
