// The bot of sdks.py in Node: sdks.js node URL BOT_ID SECRET is npm's @wecom/aibot-node-sdk,
// sdks.js json TOKEN KEY answers JSON callbacks with npm's @wecom/crypto and prints its URL.
const crypto = require('crypto');
const http = require('http');

const card = { card_type: 'button_interaction', main_title: { title: '告警' }, task_id: 'T1',
  button_list: [{ text: '确认', key: 'ok', style: 1 }] };
const confirmed = { ...card, main_title: { title: '已确认' } };
const data = Buffer.alloc(256 * 5079, Buffer.from([...Array(256).keys()]));
const sha1 = (bytes) => crypto.createHash('sha1').update(bytes).digest('hex');
const md5 = (bytes) => crypto.createHash('md5').update(bytes).digest('hex');

function socket([url, botId, secret]) {
  const { WSClient } = require('@wecom/aibot-node-sdk');
  const client = new WSClient({ botId, secret, wsUrl: url });
  async function answer(frame) {
    const { body } = frame;
    const text = body.text ? body.text.content : '';
    if (body.msgtype === 'file') {
      const { buffer, filename } = await client.downloadFile(body.file.url, body.file.aeskey);
      await client.replyStream(frame, 's', `${filename} ${sha1(buffer)}`, true);
    } else if (text.includes('流')) {
      for (let n = 1; n < 4; n++) {
        await client.replyStream(frame, 's', '一二三'.slice(0, n), n === 3, undefined, n === 1 ? { id: 'F1' } : undefined);
      }
    } else if (text.includes('卡')) await client.replyTemplateCard(frame, card);
    else if (text.includes('推')) {
      await client.sendMessage(body.chatid || body.from.userid, { msgtype: 'markdown', markdown: { content: '**推**' } });
    } else if (text.includes('传')) {
      const media = await client.uploadMedia(data, { type: 'file', filename: '报告.bin' });
      await client.replyMedia(frame, 'file', media.media_id);
    } else {
      await client.replyStream(frame, 's', '听到 ' + (text || (body.voice ? body.voice.content : body.msgtype)), true);
    }
  }
  client.on('message', answer);
  client.on('event.enter_chat', (frame) => client.replyWelcome(frame, { msgtype: 'text', text: { content: '您好' } }));
  client.on('event.template_card_event', (frame) => client.updateTemplateCard(frame, confirmed, [frame.body.from.userid]));
  client.connect();
}

function callbacks([token, key]) {
  const { getSignature, encrypt, decrypt } = require('@wecom/crypto');
  const polls = {};
  let rate;
  const rated = new Promise((done) => { rate = done; });
  const stream = (id, content, finish, more) => ({ msgtype: 'stream', stream: { id, content, finish, ...more } });

  async function download(url) {
    const aes = Buffer.from(key + '=', 'base64');
    const decipher = crypto.createDecipheriv('aes-256-cbc', aes, aes.subarray(0, 16)).setAutoPadding(false);
    const sealed = Buffer.from(await (await fetch(url)).arrayBuffer());
    const plain = Buffer.concat([decipher.update(sealed), decipher.final()]);
    return plain.subarray(0, plain.length - plain[plain.length - 1]);
  }
  async function late(url) {            // the second time it must be refused
    const body = JSON.stringify({ msgtype: 'markdown', markdown: { content: '晚了' } });
    const codes = [];
    for (let n = 0; n < 2; n++) codes.push((await (await fetch(url, { method: 'POST', body })).json()).errcode);
    if (String(codes) !== '0,60140') throw new Error('response_url answered ' + codes);
  }
  async function answer(body) {
    const event = body.event || {};
    if (event.eventtype === 'enter_chat') return { msgtype: 'text', text: { content: '您好' } };
    if (event.eventtype === 'template_card_event') {
      return { response_type: 'update_template_card', template_card: confirmed };
    }
    if (event.eventtype === 'feedback_event') rate(`${event.feedback_event.id} ${event.feedback_event.type}`);
    if (body.msgtype === 'event') return {};
    if (body.msgtype === 'stream') {
      const n = ++polls[body.stream.id];
      return stream(body.stream.id, '一二三'.slice(0, n), n === 3);
    }
    if (body.msgtype === 'file') return stream(body.msgid, sha1(await download(body.file.url)), true);
    const text = body.text.content;
    if (text.includes('卡')) return { msgtype: 'template_card', template_card: card };
    if (text.includes('评')) return stream(body.msgid, await rated, true);
    if (text.includes('图')) {
      const png = Buffer.from('89504e470d0a1a0a00', 'hex');
      return stream(body.msgid, '看', true, { msg_item: [
        { msgtype: 'image', image: { base64: png.toString('base64'), md5: md5(png) } }] });
    }
    if (text.includes('晚')) {
      late(body.response_url);
      return {};
    }
    polls[body.msgid] = 1;
    return stream(body.msgid, '一', false, { feedback: { id: 'F1' } });
  }
  const server = http.createServer((request, response) => {
    const query = Object.fromEntries(new URL(request.url, 'http://x').searchParams);
    const parts = [];
    const genuine = (sealed) => getSignature(token, query.timestamp, query.nonce, sealed) === query.msg_signature;
    request.on('data', (part) => parts.push(part));
    request.on('end', async () => {
      if (request.method === 'GET') {
        response.end(genuine(query.echostr) ? decrypt(key, query.echostr).message : 'no');
        return;
      }
      const sealed = JSON.parse(Buffer.concat(parts)).encrypt;
      const opened = decrypt(key, sealed);
      if (!genuine(sealed) || opened.id !== '') throw new Error('not from WeCom');
      const reply = encrypt(key, JSON.stringify(await answer(JSON.parse(opened.message))), '');
      response.setHeader('Content-Type', 'text/plain; charset=utf-8');
      response.end(JSON.stringify({ encrypt: reply, msgsignature: getSignature(token, query.timestamp, query.nonce, reply),
        timestamp: query.timestamp, nonce: query.nonce }));
    });
  });
  server.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}/weixin`));
}

({ node: socket, json: callbacks })[process.argv[2]](process.argv.slice(3));
