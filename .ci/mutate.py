"""Does a test notice? Important lines of easywechat.py are changed, one at a time, and the tests run: mutate.py [WORD]...

Each row: the test classes that should notice (they run first, then all), a text that stands exactly once in the file,
and what it becomes. Two run at a time, each in a copy. WORDs choose the rows that hold one of them.
Prints the survivors; the exit code is 1 if there are any.
"""
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
WITHIN = 240      # seconds; who hangs is noticed too

MUTATIONS = [
    # the log
    ('ErrorTests DispatcherTests', "if self._clock() - self._since >= 60:", "if False:"),
    ('DispatcherTests', "shown = self._count[client] <= self.lines and self._written < self.total",
     "shown = self._count[client] <= self.lines"),
    ('DispatcherTests', "if client not in self._count and len(self._count) >= self.addresses:", "if False:"),
    ('ErrorTests RetryTests', "for secret in sorted(_secrets.union(_tokens), key=len, reverse=True):",
     "for secret in sorted(_tokens, key=len, reverse=True):"),
    ('ErrorTests', "return _escape(text if len(text) <= limit else text[:limit] + '...')", "return _escape(text)"),
    # XML, crypto
    ('XmlTests', "if self._count > _XML_ELEMENTS or len(self._open) > _XML_DEPTH:", "if self._count > _XML_ELEMENTS:"),
    ('XmlTests', "if len(text) > _XML_SIZE:", "if False:"),
    ('XmlTests', "replace(']]>', ']]]]><![CDATA[>')", "replace(']]>', '')"),
    ('XmlTests RetryTests', "if depth > 64:", "if depth > 10 ** 9:"),
    ('CryptoTests', "raise CryptoError(ierror.WXBizMsgCrypt_DecryptAES_Error)\n        data = data[:-padding]",
     "pass\n        data = data[:-padding]"),
    ('CryptoTests', "receive_id = receive_ids.get(data[end:])", "receive_id = ''"),
    ('CryptoTests', "if not data or data.translate(None, _BASE64) or padding > 2 or len(encrypt) % 4:",
     "if not data or data.translate(None, _BASE64):"),
    ('CryptoTests', "_NONCE = re.compile('[!-~]{1,63}')", "_NONCE = re.compile('[!-~]+')"),
    ('WireTests', "if not _ECHO.fullmatch(text):", "if False:"),
    ('WireTests DispatcherTests', "elif ahead and not -back <= moment - now <= ahead:",
     "elif ahead and not -back <= moment - now <= 12 * ahead:"),
    ('WireTests DispatcherTests', "elif ahead and not -back <= moment - now <= ahead:",
     "elif ahead and not moment - now <= ahead:"),
    ('DispatcherTests', "if now < _RELEASED:", "if False:"),
    # configuration
    ('ConfigTests NeighbourTests', "if mode & 0o002:", "if False:"),
    ('NeighbourTests', "if not here or _only_ours(path):", "if True:"),
    ('NeighbourTests', "for key in ('api_base', 'ca_file', 'bot_url') * here:", "for key in ():"),
    # threads
    ('ServerTests', "if not seat[0].acquire(timeout=self.idle):", "if not seat[0].acquire():"),
    ('ServerTests', "before = threading.stack_size(1 << 20)", "before = threading.stack_size()"),
    ('LateTests OnceTests', "if self._busy >= self._limit and not self._changed.wait_for(lambda: self._busy < self._limit, "
     "wait):", "if False:"),
    ('RetryTests', "while not self._gate.acquire(timeout=max(0, end - time.monotonic())):", "while not self._gate.acquire():"),
    ('ForkTests', "os.register_at_fork(after_in_child=_check_fork)", "pass"),
    ('AsyncTests ForkTests', "if os.getpid() not in self._loops:", "if not self._loops:"),
    ('AsyncTests', "            future.cancel()\n            under_way.discard(future)",
     "            under_way.discard(future)"),
    ('AsyncTests', "                    await taken\n", "                    pass\n"),
    ('AsyncTests', "            if time.monotonic() > deadline - 0.2:\n                for road in self._roads:\n                    road.cancel()\n", ""),
    # stores
    ('StoreTests', "if 16 * len(self[-1]) >= limits.max_entries or 16 * self._size >= limits.max_bytes:",
     "if 16 * len(self[-1]) >= limits.max_entries:"),
    ('StoreTests', "if 16 * len(self[-1]) >= limits.max_entries or 16 * self._size >= limits.max_bytes:",
     "if 16 * self._size >= limits.max_bytes:"),
    ('StoreTests', "            if nx and self._pages.page_of(name).get(name, (0, None))[0] > self._clock():\n"
     "                return None\n", ""),
    ('StoreTests', "if ends <= self._clock():\n                return None", "if False:\n                return None"),
    ('StoreTests', "_fresh(self, _lock=threading.Lock)\n\n    def _take",
     "_fresh(self, _lock=contextlib.ExitStack)\n\n    def _take"),
    ('FileStoreTests', "            with contextlib.suppress(OSError):\n                os.unlink(temporary)\n            raise",
     "            raise"),
    ('FileStoreTests', "or found.st_uid != os.geteuid()):\n                raise OSError(errno.EPERM",
     "or False):\n                raise OSError(errno.EPERM"),
    ('FileStoreTests', "if os.name == 'posix' and (found.st_uid != os.geteuid() or found.st_mode & 0o077",
     "if os.name == 'posix' and (found.st_uid != os.geteuid() or found.st_mode & 0o007"),
    ('FileStoreTests', "if not match or len(value) != int(match.group(5)):", "if not match:"),
    ('FileStoreTests', "with self.lock(name, 0.4) if nx else contextlib.ExitStack() as mine:",
     "with contextlib.ExitStack() as mine:"),
    ('FileStoreTests WorkerTests', "if abs(now - self._swept) < 60:", "if self._swept:"),
    ('FileStoreTests', "if temporary or not good:", "if not good:"),
    ('FileStoreTests', "if not mutex.acquire(timeout=within):", "if not mutex.acquire():"),
    ('FileStoreTests', "if mine or time.monotonic() >= deadline:", "if mine:"),
    ('WorkerTests', "fcntl.lockf(fd, (fcntl.LOCK_EX if flags else fcntl.LOCK_SH) | fcntl.LOCK_NB)", "pass"),
    ('StoreTests OnceTests', "        if nx and self._memory.get(name) is not None:\n            return None\n", ""),
    ('StoreTests OnceTests', "        if self._memory.get(name) is not None:\n            return None\n", ""),
    ('StoreTests', "self._until = probe and time.monotonic() + self.retry_after", "self._until = 0"),
    ('OnceTests', "result = _within(self._threads, self._limits.store_within, lambda: job(self.store))",
     "result = job(self.store)"),
    # configuration as people write it
    ('ConfigTests', "if mode & 0o006 and not _keeps_modes(os.path.dirname(path)):", "if False:"),
    ('ConfigTests', "        if os.path.isdir(path):\n", "        if False:\n"),
    # messages, requests
    ('MessageTests', "most = begin + len(piece.encode('utf-8')[:room].decode('utf-8', 'ignore'))", "most = begin + room // 3"),
    ('MessageTests', "if m.end() not in edges and not any(a < m.end() < b for a, b in near):", "if True:"),
    ('MessageTests', "        if begin < a < end < b:\n            end = a\n", ""),
    ('MessageTests', "inside = [a for a in again if a[0] <= end < a[1]]", "inside = []"),
    ('MessageTests', "whole += [(start, end) for start, end in lines if 4 * (end - start) < limit]", ""),
    ('MessageTests', "return _TAG.sub(lambda m: '\\uff1c' + m.group()[1:], _TAG.sub('', text))", "return _TAG.sub('', text)"),
    ('WireTests', "elif receive_id.lower() in ('', sender) or receiver not in ('', receive_id.lower()):",
     "elif receiver not in ('', receive_id.lower()):"),
    ('DispatcherTests', "'%s\\0%s' % (msg['MsgId'], msg.get('FromUserName'))", "msg['MsgId']"),
    ('MediaTests TransportTests', "if not where.startswith(('https://', url.partition('//')[0] + '//')):", "if False:"),
    ('TransportTests MediaTests', "if response.status not in (301, 302, 303, 307, 308) or not where or not left:",
     "if response.status not in (301, 302, 303, 307, 308) or not where:"),
    ('MediaTests', "                if sent > self._file.size:\n                    break\n", ""),
    ('MediaTests', "if sent != self._file.size:", "if False:"),
    ('RetryTests FetchTests', "        if got > limit:\n", "        if False:\n"),
    ('RetryTests', "if length and re.fullmatch('[0-9]{1,15}', length) and got < int(length):", "if False:"),
    ('RetryTests', "            if self._aborted:\n                raise OSError('太晚了')\n", ""),
    ('RetryTests', "(status == 200 or status >= 500) and not call.harmless)", "False)"),
    ('RetryTests SendTests', "again = failure.errcode in (-1, 503) and n < caller.tries and then < begin + self._within",
     "again = failure.errcode in (-1, 503) and then < begin + self._within"),
    ('SendCommandTests RetryTests',
     "if not again and (getattr(failure, 'maybe_sent', True) or then > begin + caller.retry_within):",
     "if not again and then > begin + caller.retry_within:"),
    ('MediaTests', "name + '_' * bool(_RUNNABLE.search(name))", "name"),
    ('MediaTests', "os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))", "pass"),
    # the client
    ('SendTests', "if len(slots) >= most]", "if False]"),
    ('SendTests', "while self._slots and next(iter(self._slots.values()))[-1][0] < now - longest:", "while False:"),
    ('SendTests', "            slot[0] = max(slot[0], self._clock())\n", "            pass\n"),
    ('RetryTests', "self._refused = self._clock() + self.refused_within, (e.errcode, e.errmsg, e.path)", "pass"),
    ('RetryTests', "ex=max(seconds - self.token_margin, seconds // 2, 1))", "ex=seconds)"),
    ('RetryTests', "if last or e.errcode not in (40001, 40014, 42001):", "if e.errcode not in (40001, 40014, 42001):"),
    ('RetryTests', "if flight is None or flight.done():", "if True:"),
    ('RetryTests', "with self._machine.lock(self._token_name, max(self.call_within, self.retry_within), kind='token'):",
     "with contextlib.ExitStack():"),
    # callbacks, once
    ('CallbackTests', "text = str(msg.get('Content', '')).strip().strip(_BLANKS)", "text = str(msg.get('Content', ''))"),
    ('OnceTests', "if self.reply is None and self.stage == _ENDED:", "if False:"),
    ('OnceTests DispatcherTests', "first = self.deliveries.pop(0)[1] if len(self.deliveries) > most else None",
     "first = None"),
    ('DispatcherTests', "most = self._limits.max_callbacks\n", "most = 10 ** 9\n"),
    ('DispatcherTests', "self._busy[sender] < max(1, most // 4)", "self._busy[sender] < most"),
    ('OnceTests', "                elif run.stage == _ENDED:\n                    self._limits.store.delete(run.key)\n", ""),
    ('WireTests', "ex=self._limits.kept + self._limits.max_skew + 1)", "ex=self._limits.kept)"),
    ('OnceTests', "if run.record.acquire(wait):", "if run.record.acquire(True):"),
    ('OnceTests WorkerTests', "                             or now >= run.leased + limits.lease / 3):", "                             ):"),
    ('OnceTests', "        if run.stage == _ENDED:\n            if self._errands.submit(0, self._give_up, run):\n"
     "                run.due = None\n", "        if run.stage == _ENDED:\n            run.due = None\n"),
    ('OnceTests', "            self._wake.wait(max(0.001, wake - time.monotonic()))",
     "            self._wake.wait(max(0.001, wake - time.monotonic()) + 30)"),
    ('OnceTests', "            run.expire(now - run.replies.hold_within)\n", "            pass\n"),
    ('OnceTests', "self._finish(run) if run.leased else self._forget(run)", "self._forget(run)"),
    # replies
    ('OnceTests ReplyTests', "        self._settle(parcel)\n        self._outbox.kick(parcel.user)\n\n    def late",
     "        self._settle(parcel)\n\n    def late"),
    ('LateTests', "elif time.monotonic() - parcel.run.begin < self.patience:", "elif True:"),
    ('LateTests', "if user in self._busy or not self._turn(user):", "if not self._turn(user):"),
    ('ReplyTests LateTests', "if not self._asking and time.monotonic() >= self._ask_at:", "if not self._asking:"),
    ('LateTests', "while len(parcel.held) + len(parcel.items) >= self.most and self._can_send() is not False:",
     "while False:"),
    ('LateTests', "if (parcel.way or len(parcel.held) >= self.most) and self._can_send() is False:", "if False:"),
    ('LateTests OnceTests', "            if up and parcel.way == 'push':         # 不然先发，再答\n"
     "                parcel.run.conclude(b'')\n", ""),
    ('ReplyTests', "if isinstance(e, APIError) and not getattr(e, 'maybe_sent', False):", "if isinstance(e, APIError):"),
    # dispatcher
    ('DispatcherTests', "if len(body) > self.max_body:", "if False:"),
    ('DispatcherTests', "if not ready.acquire(timeout=self.hold_within + 1):", "if not ready.acquire():"),
    ('DispatcherTests', "                if len(body) < length:\n", "                if False:\n"),
    ('DispatcherTests', "if error.status != 503:", "if True:"),
    # what a program needs, whom it hears, how it ends
    ('ConfigTests', "if not values['bot_secret'] or key not in ('corpid', 'secret', 'agentid')))", "))"),
    ('ConfigTests', "wrong = set(settings).union(needed) - set(_APP_KEYS + _SYSTEM_KEYS)",
     "wrong = set(settings) - set(_APP_KEYS + _SYSTEM_KEYS)"),
    ('CallbackTests', "(user in self._only if user else event):", "user in self._only:"),
    ('CallbackTests', "set(self.settings['touser'].lower().split('|'))", "set(self.settings['touser'].split('|'))"),
    ('CallbackTests', "return None if event or not self.refusal else self._refuse, ()",
     "return self._refuse, ()"),
    ('CallTests', "with self.lock(name, 0.4) if nx", "with self.lock(name, 1) if nx"),
    ('CallTests', "return promise.result(max(deadline - time.monotonic(), min(seconds, 0.5)))",
     "return promise.result(deadline - time.monotonic())"),
    ('CommandTests', "code = 3 if isinstance(e, NetworkError) else 1 if isinstance(e, (APIError, CryptoError)) else 2",
     "code = 1 if isinstance(e, (APIError, CryptoError)) else 2"),
    ('CommandTests', "            if threading.current_thread() is not threading.main_thread():\n                raise\n",
     "            raise\n"),
    ('PromiseTests', "        if any(self._crypts):\n            _need_xml()\n", ""),
    ('CallbackTests', "                parcel.run.given += 1\n                if not self._add", "                if not self._add"),
    ('ConfigTests', "if e.errmsg not in bad:", "if True:"),
    ('JsonBotTests', "                        self._live[poll.stream] = poll\n", "                        pass\n"),
    # server
    ('ServerTests', "if name in fields:\n            raise WeChatError(400, '%s stands twice：头部里有两个' % name)",
     "if False:\n            raise WeChatError(400)"),
    ('ServerTests', "    if len(lines) > 64:\n", "    if False:\n"),
    ('ServerTests', "    if len(lines) > 64:\n", "    if len(lines) > 32:\n"),
    ('ServerTests', "head, rest = self._read_head(begin + app.head_within)",
     "head, rest = self._read_head(begin + app.request_within)"),
    ('ServerTests', "if line > server.max_line or (line < 0 and len(data) > server.max_line):", "if False:"),
    ('ServerTests', "if end > server.max_head or (end < 0 and len(data) > server.max_head):", "if False:"),
    ('ServerTests', "        if linger:\n            self._linger()\n", ""),
    ('ServerTests', "deadline, left = time.monotonic() + 0.3, 1 << 19", "deadline, left = time.monotonic() + 3, 1 << 19"),
    ('ServerTests', "            self.request.settimeout(self.server.dispatcher.write_within)\n",
     "            self.request.settimeout(None)\n"),
    ('ServerTests', "self._most = max(1, min(self._most, soft // 4))", "pass"),
    ('ServerTests', "self.threads = _Threads(self._most + 2 * dispatcher.max_callbacks)",
     "self.threads = _Threads(self._most)"),
    ('ServerTests', "                    self._evict(self._most)\n", "                    pass\n"),
    ('ServerTests', "                    self._evict(len(self._reading) - 8)\n", "                    pass\n"),
    ('ServerTests', "                time.sleep(0.05)            # 马上再来也没有用\n", ""),
    ('ServerTests', "            if sum(self._reading.values()) > self.dispatcher.max_reading:\n", "            if False:\n"),
    ('ServerTests ForkTests', "            request.shutdown(socket.SHUT_RDWR)\n        request.close()",
     "            pass\n        request.close()"),
    ('ServerTests', "        self._evict(0)\n", ""),
    ('ServerTests', "signal.signal(number, signal.SIG_IGN)", "pass"),
    ('ServerTests', "fd = signal.set_wakeup_fd(alarm.fileno())", "fd = None"),
    ('ServerTests', "            if fd is not None:\n                signal.set_wakeup_fd(fd)\n", ""),
    # command line
    ('CommandTests', "if demo and not _LOOPBACK.fullmatch(host):", "if False:"),
    ('CommandTests', "if demo and not _LOOPBACK.fullmatch(_split_url(url).hostname):", "if False:"),
    ('CommandTests', "os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb')",
     "os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'wb')"),
    ('SendCommandTests', "    if len(data) > _XML_SIZE:\n        raise _CommandError", "    if False:\n        raise _CommandError"),
    ('SendCommandTests', "        if args.rest and not args.markdown:\n", "        if False:\n"),
    # the long connection
    ('LineTests', '            if now - line.heard > bot.silent_within:\n',
     '            if False:\n'),
    ('LineTests', '            if time.time() - now - skew > bot.silent_within + bot.ping_every:\n',
     '            if False:\n'),
    ('LineTests', "            if frame.get('errcode') == 846609:\n",
     '            if False:\n'),
    ('LineTests', '            if kicked:\n                raise _Kicked\n',
     '            if kicked:\n                raise OSError\n'),
    ('LineTests', '        self._pauses[stage] = min(2 * pause, most)\n',
     ''),
    ('LineTests', '            if self._life is not life:\n                return False\n',
     ''),
    ('LineTests', "                stage, error = 'waiting' if e.errcode in self._retry else 'refused', e\n",
     "                stage, error = 'waiting', e\n"),
    ('LineTests', '        talk.stale = talk.stale or talk.line is not self._session.line      # ',
     '        talk.stale = talk.stale      # '),
    ('LineTests', '                if self._bot._clock() >= end or not self.wait(end - self._bot._clock()):\n                    raise\n',
     '                raise\n'),
    ('LineTests', '                if mine and not session.users:\n',
     '                if mine:\n'),
    ('BotTests', '        if code == 6000 and talk.clashes < 3:\n',
     '        if code == 6000:\n'),
    ('BotTests', '            talk.stale = True               # 其余的主动发送\n',
     ''),
    ('BotTests', '                if not talk.items and talk.over and talk.bubble and not talk.stale:\n                    talk.items.append(None)\n',
     ''),
    ('BotTests', '    if size < 32 or size % 16:\n',
     '    if False:\n'),
    ('BotTests', '                talk.bubble = None              # 也许写完了；或者就没有它\n',
     '                pass\n'),
    ('BotTests', "        parcel.closing = '出错了'\n",
     ''),
    ('DoorTests', "            if not _proven(hello, _keyed(self._bot, 'guest', ours, theirs)):\n",
     '            if False:\n'),
    ('DoorTests', "            if _proven(host, _keyed(bot, 'host', theirs, ours)):\n",
     '            if True:\n'),
    ('DoorTests', '                if not session.wait(self._bot.offline_within):\n                    raise',
     '                if False:\n                    raise'),
    ('ReplyTests', "len(text.encode('utf-8')) <= 2048:\n                self.items[-1]",
     'True:\n                self.items[-1]'),
    # JSON mode
    ('JsonBotTests', 'slow = property(lambda self: self._owner.answer_within * 2 / 3)',
     'slow = property(lambda self: self._owner.hold_within)'),
    ('JsonBotTests', 'return poll.frame() if poll else self._owner.store.get(',
     'return self._owner.store.get('),
    ('JsonBotTests', '            self._live.pop(run.parcel.stream, None)',
     '            pass #'),
    ('JsonBotTests', '        self._live[run.parcel.stream] = run.parcel\n',
     '        pass\n'),
    ('JsonBotTests', 'poll.open = not poll.event',
     'poll.open = True'),
    ('JsonBotTests', "run.conclude(poll.frame() if poll.open else b'{}')",
     "run.conclude(poll.frame() if poll.open else b'')"),
    ('JsonBotTests', '            finally:\n                poll.lock.release()\n        self._keep(poll)\n',
     '            finally:\n                poll.lock.release()\n'),
    ('JsonBotTests', '            if time.monotonic() - poll.begin < self._bot.bubble_within:\n                self._keep(poll)',
     '            if time.monotonic() - poll.begin < self._bot.bubble_within:\n                pass'),
    ('JsonBotTests', "'（还没有好，好了再发）' if poll.url else ''",
     "''"),
    ('JsonBotTests', "'（还没有好，好了再发）' if poll.url else ''",
     "'（还没有好，好了再发）'"),
    ('JsonBotTests', '        for poll in self.left():\n            self._shut(poll)\n',
     '        pass\n'),
    ('JsonBotTests', 'due = poll.newer or time.monotonic() > poll.saved + 5 * self._owner.lease',
     'due = poll.newer'),
    ('JsonBotTests', 'due = poll.newer or time.monotonic() > poll.saved + 5 * self._owner.lease',
     'due = time.monotonic() > poll.saved + 5 * self._owner.lease'),
    ('JsonBotTests', 'ex=600 if poll.last else 20 * self._owner.lease',
     'ex=600'),
    ('JsonBotTests', 'ex=600 if poll.last else 20 * self._owner.lease',
     'ex=20 * self._owner.lease'),
    ('JsonBotTests', '            if not poll.open or poll.last:\n                return\n',
     '            if not poll.open:\n                return\n'),
    ('JsonBotTests', "            poll.finish('…', blank)",
     "            poll.finish('', blank)"),
    ('JsonBotTests', '            poll.owed = bool(poll.url) and not poll.text.strip() and not poll.images\n',
     '            pass\n'),
    ('JsonBotTests', '            poll.owed = bool(poll.url) and not poll.text.strip() and not poll.images\n',
     '            poll.owed = True\n'),
    ('JsonBotTests', "20480 - len(more.encode('utf-8'))",
     '20480'),
    ('JsonBotTests', '[:self.most + 1]',
     ''),
    ('JsonBotTests', 'self._grow(parcel, words * bool(parcel.text.strip()))',
     'pass'),
    ('JsonBotTests', 'self._grow(parcel, words * bool(parcel.text.strip()))',
     'self._grow(parcel, words)'),
    ('JsonBotTests', '            _json_bytes(message)                # 写不成',
     '            pass                # 写不成'),
    ('JsonBotTests', 'room = 0 if poll.event or poll.last else 10 - len(poll.images)',
     'room = 10 - len(poll.images)'),
    ('JsonBotTests', 'room = 0 if poll.event or poll.last else 10 - len(poll.images)',
     'room = 0 if poll.event or poll.last else 99'),
    ('JsonBotTests', "or not data.startswith((b'\\xff\\xd8', b'\\x89PNG'))",
     ''),
    ('JsonBotTests', 'if len(data) > most or',
     'if'),
    ('JsonBotTests', '            if some and not poll.event and not poll.last:',
     '            if some and not poll.event:'),
    ('JsonBotTests', '            if some and not poll.event and not poll.last:',
     '            if some and not poll.last:'),
    ('JsonBotTests', "blank='（见下一条）' if poll.cards and poll.url else ''",
     "blank=''"),
    ('JsonBotTests', '            if poll.run.reply is None:\n                poll.run.conclude(poll.last',
     '            if True:\n                poll.run.conclude(poll.last'),
    ('JsonBotTests', '        if poll.open:\n            self._save(poll)\n        self._later',
     '        self._later'),
    ('JsonBotTests', "        if poll.event == 'enter_chat' and poll.text.strip():",
     '        if poll.event and poll.text.strip():'),
    ('JsonBotTests', '            poll.cards.remove(card)\n',
     '            pass\n'),
    ('JsonBotTests', "            rest = poll.head + rest.lstrip('\\n')",
     "            rest = rest.lstrip('\\n')"),
    ('JsonBotTests', "            rest = poll.head + rest.lstrip('\\n')",
     '            rest = poll.head + rest'),
    ('JsonBotTests', "        if len(messages) > 1:\n            logger.warning('not sent to %s: 回答太长",
     "        if False:\n            logger.warning('not sent to %s: 回答太长"),
    ('JsonBotTests', '                self._bot._sleep(self._bot.frame_every)\n            self._respond',
     '                pass\n            self._respond'),
    ('JsonBotTests', '            self._respond(poll, messages[0])',
     '            for m in messages: self._respond(poll, m)'),
    ('JsonBotTests', '            _remember(code)\n',
     ''),
    ('JsonBotTests', '            _secrets.discard(code)',
     '            pass'),
    ('JsonBotTests', "_need(parts.scheme == 'https' or _LOOPBACK.fullmatch(parts.hostname), 'response_url",
     "_need(True, 'response_url"),
    ('JsonBotTests', "            if status != 200 or answer.get('errcode'):",
     '            if False:'),
    ('JsonBotTests', "        if msg['ToUserName'] != self.settings['bot_id']:",
     '        if False:'),
    ('JsonBotTests', '        if poll.record.acquire(wait):',
     '        if poll.record.acquire(True):'),
    ('JsonBotTests', '        if up and poll.lock.acquire(False):',
     '        if up and poll.lock.acquire():'),
    ('JsonBotTests', "            if status != 200 or answer.get('errcode'):",
     "            if answer.get('errcode'):"),
    ('JsonBotTests', "        self.event = str(msg.get('Event') or '?') if",
     "        self.event = str(msg.get('Event') or '') if"),
]


def run(folder, *classes):
    """Whether the tests in FOLDER are content."""
    command = [sys.executable, 'test_easywechat.py', *(['-f', *classes] if classes else [])]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        return process.wait(WITHIN) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def survives(mutation):
    classes, old, new = mutation
    with tempfile.TemporaryDirectory() as top:
        folder = os.path.join(top, 'copy')
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.git', '.ci', '__pycache__'))
        path = os.path.join(folder, 'easywechat.py')
        with open(path, encoding='utf-8') as f:
            source = f.read()
        with open(path, 'w', encoding='utf-8') as f:
            f.write(source.replace(old, new))
        return run(folder, *classes.split()) and run(folder)


def main():
    with open(os.path.join(ROOT, 'easywechat.py'), encoding='utf-8') as f:
        source = f.read()
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in line for word in sys.argv[1:] for line in m)]
    wrong = [old for _, old, _ in chosen if source.count(old) != 1]
    if wrong:
        sys.exit('not exactly once in easywechat.py:\n' + '\n'.join(wrong))
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (_, old, new), alive in zip(chosen, pool.map(survives, chosen)):
            if alive:
                survivors += 1
                print('SURVIVED\n  %s\n  %s' % (old.strip(), new.strip()), flush=True)
    print('mutations: %d passed, %d failed' % (len(chosen) - survivors, survivors))
    return 1 if survivors else 0


if __name__ == '__main__':
    sys.exit(main())
