-- One request after another from the file REQUESTS (a line each: target, blank, body), beginning at OFFSET.
local requests, at = {}, tonumber(os.getenv('OFFSET'))
for line in io.lines(os.getenv('REQUESTS')) do
  local target, body = line:match('^(%S+) (.*)$')
  requests[#requests + 1] = {target, body}
end
local headers = {['Content-Type'] = 'text/xml', ['Connection'] = 'close'}
function request()
  at = at % #requests + 1
  return wrk.format('POST', requests[at][1], headers, requests[at][2])
end
