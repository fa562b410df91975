#!/usr/bin/env python3
"""程序猿监控器：对它说「拍照」「视频」「状态」。

    python examples/simulator.py examples/monkey_monitor.py     # 没有账号、没有相机也能试
    python examples/monkey_monitor.py                           # 用自己的 config.ini；[--port 8000]

只回答 config.ini 里 touser 写的人（`a|b`；`@all` 是可见范围里的所有人），别人只得到一句话。照片要上传，所以应用还要写
secret 和 agentid。装了哪个相机程序就用哪个（见 PHOTO、VIDEO，依次试）；一个也没有，「拍照」得到一张写着时间的测试图。
"""

import argparse
import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

# 在自己的项目里，easywechat.py 就放在程序旁边，不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402
import nas_monitor  # noqa: E402

logger = easywechat.logger

#: 依次试的相机程序，每行是先后要跑的几条命令；装齐了、提到的 /dev/… 也在，才试。
#: 它们在一个临时目录里跑，要写出 photo.jpg、clip.mp4。
PHOTO = (
    ['rpicam-still -n -t 1000 --width 1280 --height 720 -o photo.jpg'],
    ['libcamera-still -n -t 1000 --width 1280 --height 720 -o photo.jpg'],
    ['raspistill -n -t 1000 -w 1280 -h 720 -o photo.jpg'],
    ['fswebcam -q -d /dev/video0 -r 1280x720 -S 10 --no-banner photo.jpg'],
    ['ffmpeg -nostdin -loglevel error -f v4l2 -i /dev/video0 -ss 1 -frames:v 1 photo.jpg'],
)
VIDEO = (
    ['rpicam-vid -n -t 5000 --width 1280 --height 720 --codec libav -o clip.mp4'],
    ['libcamera-vid -n -t 5000 --width 1280 --height 720 --codec libav -o clip.mp4'],
    ['rpicam-vid -n -t 5000 --width 1280 --height 720 -o clip.h264',
     'ffmpeg -nostdin -loglevel error -r 30 -i clip.h264 -c copy clip.mp4'],
    ['raspivid -n -t 5000 -w 1280 -h 720 -fps 25 -o clip.h264',
     'ffmpeg -nostdin -loglevel error -r 25 -i clip.h264 -c copy clip.mp4'],
    ['ffmpeg -nostdin -loglevel error -f v4l2 -i /dev/video0 -t 5 -pix_fmt yuv420p clip.mp4'],
)
#: 一条命令最多跑多少秒。
PATIENCE = 30

HELP = '可以说：\n拍照\n视频（五秒，要等一会儿）\n状态'

#: 同时只有一个人用相机。
camera = threading.Lock()


# ---- 相机 -------------------------------------------------------------------------------------

class CameraError(Exception):
    """没有拍成；``str()`` 是给用户的原因。"""


def is_here(command):
    """这条命令的程序装了，提到的设备也在。"""
    program, *arguments = command.split()
    devices = [a for a in arguments if a.startswith('/dev/')]
    return shutil.which(program) and all(map(os.path.exists, devices))


def run(command, folder):
    """在 ``folder`` 里跑一条命令；失败、超时抛 `CameraError`。"""
    program = command.split()[0]
    with open(os.path.join(folder, 'output'), 'w+b') as output:
        # 输出进文件，不进管道：程序被杀以后，它的子进程还会占着管道
        try:
            code = subprocess.run(command.split(), cwd=folder, stdin=subprocess.DEVNULL,
                                  stdout=output, stderr=output, timeout=PATIENCE).returncode
        except subprocess.TimeoutExpired:
            raise CameraError('%s 过了 %g 秒还没有拍完' % (program, PATIENCE)) from None
        except OSError as e:
            raise CameraError('%s 跑不起来（%s）' % (program, e.strerror)) from None
        output.seek(0)
        last = output.read().decode('utf-8', 'replace').strip().rpartition('\n')[2]
    if code:
        said = ''.join(filter(str.isprintable, last))[:200]
        raise CameraError('%s 出错了（退出码 %d）%s' % (program, code, said and '：' + said))


def shoot(recipes, path):
    """依次试，写出 ``path`` 为止；一个也没有装返回 False，装了的都不成抛 `CameraError`。"""
    troubles = []
    for commands in recipes:
        if not all(map(is_here, commands)):
            continue
        try:
            with camera:
                for command in commands:
                    run(command, os.path.dirname(path))
            if os.path.exists(path) and os.path.getsize(path) > 5:
                return True
            raise CameraError('%s 什么也没有拍到' % commands[0].split()[0])
        except CameraError as e:
            logger.error('camera: %s', e)
            troubles.append(str(e))
            with contextlib.suppress(OSError):      # 半个文件：下一个程序不肯盖过它
                os.unlink(path)
    if troubles:
        raise CameraError('；'.join(troubles))
    return False


# ---- 测试图 -----------------------------------------------------------------------------------

#: 3×5 点阵：每行一个八进制数字，三个二进制位是三个点。
FONT = {'0': '75557', '1': '26227', '2': '71747', '3': '71717', '4': '55711', '5': '74717',
        '6': '74757', '7': '71122', '8': '75757', '9': '75717', ':': '02020', '-': '00700', ' ': '00000'}


def chunk(kind, data):
    """PNG 的一块：长度、类型、数据、校验。"""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def test_picture(now):
    """一张 PNG (bytes)，深灰底上的白字：``now`` (struct_time)。一个点放大成 10×10 个像素，字的四周空一个点。"""
    rows = []
    for text in time.strftime(' %Y-%m-%d ', now), time.strftime(' %H:%M:%S   ', now):
        for y in range(-1, 6):
            dots = ''.join(format(int(FONT[char][y]) if 0 <= y < 5 else 0, '04b') for char in text)
            rows += 10 * [b'\0' + b''.join(10 * (b'\xff' if dot == '1' else b'\x30') for dot in dots)]
    return (b'\x89PNG\r\n\x1a\n'       # 一个像素一个字节（灰度）；每行前面是滤波的种类：0，没有
            + chunk(b'IHDR', struct.pack('>IIBBBBB', len(rows[0]) - 1, len(rows), 8, 0, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(b''.join(rows))) + chunk(b'IEND', b''))


# ---- 三句话 -----------------------------------------------------------------------------------
# 返回一个 Path，easywechat 也会上传、回复，但那是在回调返回以后：临时目录已经没有了，上传失败也来不及告诉用户。所以自己
# 上传，返回 MediaId。

def photo(client):
    """「拍照」。"""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'photo.jpg')
        media = client.upload(path) if shoot(PHOTO, path) else client.upload(
            test_picture(time.localtime()), name='test.png')
        return {'MsgType': 'image', 'MediaId': media}


def video(client):
    """「视频」：五秒录完已经过了企业微信等的时候，easywechat 会主动发过去。"""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'clip.mp4')
        if not shoot(VIDEO, path):
            raise CameraError('没有相机，或者没有装录像的程序（rpicam-vid、ffmpeg）')
        title = time.strftime('%H:%M:%S')
        return {'MsgType': 'video', 'MediaId': client.upload(path), 'Title': title}


# ---- 机器人 -----------------------------------------------------------------------------------

COMMANDS = {'拍照': photo, '视频': video, '状态': lambda client: nas_monitor.report()}


def register(server):
    """把回调登记到 ``server``。"""
    @server.register_callback('text')
    def answer(msg):
        command = COMMANDS.get(re.sub(r'\W', '', msg['Content']))
        if not command:
            return HELP
        try:
            return command(server.bot if 'aibotid' in msg else server.client)   # 从哪里来，传到哪里
        except (CameraError, OSError) as e:     # 磁盘满了
            trouble = '没有拍成：%s' % e
        except easywechat.WeChatError as e:
            trouble = '拍好了，传不上去：%s' % e
        logger.error('no answer for %.64r: %s', msg['FromUserName'], trouble)
        return trouble


def main(argv=None):
    parser = argparse.ArgumentParser(description='程序猿监控器：拍照、视频、状态。')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    args = parser.parse_args(argv)
    server = easywechat.WeChatServer('demo', needs=('secret', 'agentid', 'touser'), only_touser=True)
    register(server)
    server.run(port=args.port)


if __name__ == '__main__':
    easywechat.command(main)
